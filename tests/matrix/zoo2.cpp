/* The other unit, and what both units of a C++ program have instances of. */
#include "zoo2.c"
#include "zoo.hpp"

long other_instance(long x) { return scaled(x) + ++Book<long>::made; }
