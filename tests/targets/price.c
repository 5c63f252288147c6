/* A library that is loaded by hand. */
static long calls;
__attribute__((noipa)) long share_of(long amount) { return amount * FEE / 1000; }
long price(long amount) { calls++; return share_of(amount) + calls - calls; }
