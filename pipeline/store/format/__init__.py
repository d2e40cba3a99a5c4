"""The format on disk, for readers and writers alike; docs/store-format.md describes it for other programs.

names            names of files, folders and arrays; reading a file that anybody may have written
codec            what a codec is: the class that every one derives from
groups           the codecs that store values in groups
codecs           how the values of an array are stored: one class for each codec
layout           the layout of an array; segment ids; where stores and segments are
segment_files    chunks, sizes and checksums of a segment's files, in a bucket too
metadata         the JSON of groups and arrays, as strict models
values           tensors of samples -> stored arrays

Imports: each other in this order, and nothing else of the store.
"""
