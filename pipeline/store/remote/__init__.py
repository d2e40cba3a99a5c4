"""Stores in buckets.

bucket    objects below a URL: requests, retries, and errors that say what to set
mirror    the files of stores in a bucket: small ones mirrored on this disk, chunks fetched into a segment cache

Imports: `format`, `local`, and each other in this order.
"""
