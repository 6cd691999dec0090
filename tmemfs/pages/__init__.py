"""Pages: requests for bytes of the image as stores and loads of pages. Knows nothing of FUSE, trio and the jobs.

pager         read, write and discard at any offset; what has to wait is deferred
reader        loads from a tier, verified and decoded
free_frames   where stores wait for a free frame
"""
