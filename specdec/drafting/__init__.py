"""What proposes tokens: the protocol, training-free drafters, how long drafts are, their costs, their names."""
