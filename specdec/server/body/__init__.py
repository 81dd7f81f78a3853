"""What bodies of requests may hold: every field of every endpoint is declared here once, and all else follows from it.

The checks and their messages, `/openapi.json`, and the table of fields in docs/serve.md come from these declarations.
"""
