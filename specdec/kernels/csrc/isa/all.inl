// All of the arithmetic for one instruction set: what dispatch.h includes once per set, with KERNEL_ISA defined.

#include "simd.inl"
#include "quantise.inl"
#include "product.inl"
#include "store.inl"
#include "rows.inl"
#include "attention.inl"

#undef EACH
#undef KERNEL_LANES
