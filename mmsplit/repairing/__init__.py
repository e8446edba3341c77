"""What is damaged in a set made again, each thing from what it can be made from, in place."""
