"""The control API of a running bus: HTTP with JSON over a Unix socket that only its owner and root can use.

`models` is the API as data, `api` turns requests into calls on a `Bus`, `server` serves it in a thread, `client` is
the other end, with nothing but the standard library. Importing this package loads none of them.
"""
