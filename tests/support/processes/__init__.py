"""What tests start in processes of their own, and the terminal that some of them need."""
