"""Answers over HTTP: `protocol` (JSON <-> requests) <- `scheduler` (whose turn it is) <- `service` (what an endpoint does) <- `server` (sockets)."""
