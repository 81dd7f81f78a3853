"""Run whole passes on a GPU: a decoder's layers and an MTP head's drafts, captured once and replayed."""
