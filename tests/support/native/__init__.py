"""What tests of the native kernels share."""
