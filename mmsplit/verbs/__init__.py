"""What mmsplit does: one file per verb, each a thin driver of the rooms above; none imports another."""
