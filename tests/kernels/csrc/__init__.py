"""Tests of how the C++ sources become a library: the compiler, its code, and a machine without one."""
