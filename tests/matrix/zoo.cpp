/* A zoo of C++. */
#include "zoo.hpp"
#include <functional>
#include <iostream>
#include <memory>
#include <sstream>
#include <typeinfo>
#include <vector>

KEEP long price(long x) { return x * 3 + 17 + ALL + ONE; }

/* Virtual functions, through both bases. */
struct Shape {
    virtual long area(long x) const = 0;
    virtual long edges() const { return 4; }
    virtual ~Shape() {}
};
struct Named {
    virtual std::string name() const { return "named"; }
    virtual ~Named() {}
};
struct Square : Shape, Named {
    KEEP long area(long x) const override { return x * x + W(1); }
    KEEP std::string name() const override { return ALL ? "the square" : "a square"; }
};
struct Circle : Shape {
    long radius;
    explicit Circle(long r) : radius(r) {}
    KEEP long area(long x) const override { return radius * x + W(2); }
    long edges() const override { return 0; }
};
static std::vector<std::unique_ptr<Shape>> shapes;

/* Exceptions: types of its own and of the library, clean-up, rethrown, everything. */
struct Refused : std::runtime_error {
    long code;
    explicit Refused(long c) : std::runtime_error("refused"), code(c) {}
};
struct Guard {
    long &n;
    ~Guard() { n += 5; }
};
KEEP void thrower(long kind)
{
    long cleaned = 0;
    Guard guard{cleaned};
    if (kind == 0)
        throw Refused(W(7));
    if (kind == 1)
        throw std::out_of_range("range");
    if (kind == 2)
        throw 5L;
}
KEEP long typed(long kind)
{
    try {
        thrower(kind);
    } catch (const Refused &e) {
        return e.code + W(100);
    } catch (const std::exception &e) {
        return long(strlen(e.what())) + 200;
    } catch (long n) {
        return n + 300;
    } catch (...) {
        return 400;
    }
    return 0;
}
KEEP long rethrows(long kind)
{
    try {
        try {
            thrower(kind);
        } catch (Refused &) {
            throw;
        }
    } catch (const std::runtime_error &e) {
        return W(50);
    }
    return 60;
}

/* Statics with guards; inline variables; thread-locals with constructors. */
KEEP long guarded(long x)
{
    static std::string kept = std::string("kept ") + std::to_string(x);
    return long(kept.size()) + Book<long>::open(x) + ++inline_counter + W(0);
}
struct Meter {
    long n;
    Meter() : n(number()) {}
    ~Meter() { n = 0; }
};
static thread_local Meter meter;
KEEP long metered(long x) { return meter.n += x + W(0); }

/* Lambdas, std::function, containers, streams, types at run time. */
static std::function<long(long)> stored;
KEEP long lambda(long x)
{
    std::map<std::string, long> m{{"a", 1}, {"b", 2}, {"c", W(3)}};
    long sum = 0;
    for (auto &[key, value] : m)
        sum += value * long(key.size());
    return stored(x) + sum;
}
KEEP long streams(long x)
{
    std::ostringstream out;
    out << "x=" << x + W(1) << ' ' << 1.5;
    std::cout << std::flush;
    return long(out.str().size()) + long(out.str()[5]);
}
KEEP long casts(const Shape *s)
{
    auto *named = dynamic_cast<const Named *>(s);
    return (named ? long(named->name().size()) : 3) + (typeid(*s) == typeid(Circle) ? 10 : 20) + W(0);
}
KEEP long instances(long x) { return scaled(x) + long(scaled(double(x))) + other_instance(x) + W(0); }
KEEP std::unique_ptr<Shape> maker(long kind)
{
    if (kind)
        return std::make_unique<Circle>(W(4));
    return std::make_unique<Square>();
}
KEEP long nothrow(long x) noexcept
{
    std::string s(size_t(x % 50), 'y');
    return long(s.size()) + W(0);
}

void start(void)
{
    shapes.push_back(std::make_unique<Square>());
    shapes.push_back(std::make_unique<Circle>(6));
    stored = [](long x) { return x * 2; };
}

void answer(const char *line)
{
    long x = number();
    (void)line;
    say("%ld ", price(x));
    for (auto &s : shapes)
        say("%ld %ld %ld ", s->area(x), s->edges(), casts(s.get()));
    say("%ld %ld %ld %ld %ld ", typed(0), typed(1), typed(2), typed(x), rethrows(0));
    say("%ld %ld %ld %ld ", guarded(x), metered(x), lambda(x), streams(x));
    auto made = maker(x & 1), other = maker(x | 1);
    say("%ld %ld %ld %ld ", instances(x), made->area(x), other->area(x), nothrow(x));
    say("%ld", other_count(x) + other_local(x) + helper_of_other(x) + (other_text(x)[0] == 't') + shared_tls);
}
