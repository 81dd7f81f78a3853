"""The endpoints: each reads a request's body, asks the service, and writes the answer in its protocol's shape."""
