"""Files that lie elsewhere: repositories on the Hub, HTTP addresses, whatever fsspec reaches; by byte ranges."""
