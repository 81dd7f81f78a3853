"""Pictures, sound and video: from what a user has to the numbers that a multimodal model reads."""
