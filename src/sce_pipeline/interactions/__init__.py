"""From a raw log to sequences: frames in, frames out, and a count of what every step dropped.

The functions take and return lazy Narwhals frames, so that they run on any engine Narwhals can
drive lazily. Within a user, events are always ordered by ``timestamp`` and then by ``row``, the
event's place in the file.
"""
