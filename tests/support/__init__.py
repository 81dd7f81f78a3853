"""What tests share: tiny models and folders made on the spot, scripted drafters, ways in which kernels run."""
