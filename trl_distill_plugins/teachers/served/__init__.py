"""Teachers behind an OpenAI-compatible server. See `teacher.py`."""
