"""The embedder: pictures, frames of videos and sound become soft tokens, rows that stand among a prompt's embeddings.

What: `MediaSpec` says what a model's embedder is, `MediaEmbedder` computes rows, `media_blocks` says where they stand.
"""
