/* What both units hold. */
#pragma once
#include "zoo.h"
#include <map>
#include <stdexcept>
#include <string>

inline long inline_counter = 200;
template <typename T> KEEP T scaled(T x) { return x * T(3) + T(W(1)); }
template <typename T> struct Book {
    inline static long made = 9;
    static long open(T x)
    {
        static std::string name = "book of " + std::to_string(long(x));
        return long(name.size()) + ++made;
    }
};
long other_instance(long x);
