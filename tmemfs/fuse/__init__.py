"""FUSE: /dev/fuse, the page path and the directory tree. Knows nothing of records, segments and tiers.

relay                 the threads, and their end
page_path             the way of a request for pages, from the leader to the reply
kept_requests         what the next worker finds of the requests without an answer (handling: which thread handles which)
refusing              answers errors to all, once no worker is left
leader_followers      which thread reads requests, and which may block
replies, wire         what is written to /dev/fuse, and the formats of requests
namespace_link        all other requests, to pyfuse3 and back (forwards: at which rate; interrupts: which were interrupted)
namespace, texts      the directory tree and its control files, served by pyfuse3 (contain: its errors; library: its import)
errnos, bugs          the errno of each error; what is logged of an error that is not known
mount                 mount(2)
"""
