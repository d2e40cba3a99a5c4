"""Segments on this disk: written once, then mapped.

temporary        temporary folders, locks, and publishing by rename
files            the files of stores on this disk; `remote.mirror` is the same for a bucket
writer           one unit of samples -> one committed segment
segment_cache    raw files of segments that are compressed or in a bucket, the least recently used evicted
stored_tensor    one tensor of a segment, sample by sample
segment          opening a segment: metadata proved, arrays mapped
index            sets of sample keys; sample key -> segment and row
reader           rows -> a batch
read_ahead       segments fetched before the batches that need them
resident         samples held whole in an accelerator's memory

Imports: `format`, and each other in this order.
"""
