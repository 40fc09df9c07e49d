"""A teacher's signals on disk: `codec.py` writes one document, `shards.py` many of them, `store.py` a folder of
shards that many processes read and write at once."""
