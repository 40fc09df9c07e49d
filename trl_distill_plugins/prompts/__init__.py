"""From a dataset row to two aligned views of one completion.

    files.py       JSONL, JSON, CSV and Parquet files -> datasets.Dataset
    text_files.py, columns.py  their lines, and the types of their columns
    rows.py        a row of any TRL format -> its prompt, its completion, its input
    templates.py   prompt templates with `{input}` and other columns
    encoding.py    prompts and completions -> token ids
    truncation.py  what is cut when a row is longer than the windows
    views.py       ViewBuilder: one row -> student view and teacher view
    weights.py     token weights: where a dataset has them, and what they do to labels
    message_weights.py, row_weights.py  from messages to their tokens, from a row to views with weights
    preparing.py   prepare_views: a whole dataset
    packing.py     pack_views: several rows in one sequence
    panel.py       the prompts of several teachers
    collator.py    ViewCollator: a batch of both views

This file imports nothing, so that a command line can ask `files.is_data_file` without waiting for torch.
"""
