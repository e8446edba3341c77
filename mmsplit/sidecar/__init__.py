"""What lies on disk: plan and encoded chunks <-> partition_K.json, partition_K.bin and the set manifest.

FORMAT.md beside this file is normative.  This room is the only one that writes partition files.
"""
