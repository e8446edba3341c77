"""Partitions for programs that do not know mmsplit: which files, where their bytes come from, in which form.

set_source, checkpoint_source     tensors of partitions, and spans that hold their bytes
  |
weight_files                      which tensor lies in which safetensors file, headers, weights index
parameters_writer                 or the numbers as JSON text
  |
export_record, export_run         what lies in the output; what is missing is written
"""
