"""Segments on this disk: written once, then mapped.

temporary        temporary folders, locks, and publishing by rename
files            the files of stores, on this disk; `remote.Remote` is the same for a bucket
writer           one unit of samples -> one committed segment
stored_tensor    one tensor of a segment, sample by sample
segment          opening a segment: metadata proved, arrays mapped
segment_cache    raw files of segments that are compressed or in a bucket, the least recently used evicted
index            sample key -> segment and row
reader           rows -> a batch
read_ahead       segments fetched before their batch is due
resident         samples held whole in an accelerator's memory

Imports: `format`, and each other in this order.
"""
