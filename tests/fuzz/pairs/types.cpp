// clang++ -g -gdwarf-4 -fdebug-types-section -O1 -Wl,--emit-relocs -Wl,--build-id -o types-cpp types.cpp
struct Fee { virtual long of(long quantity) const = 0; virtual ~Fee(); long least : 12; unsigned kind : 3; };
Fee::~Fee() {}
enum class Side : unsigned char { Buy = 1, Sell = 2 };
template <class T, int N> struct Ring { T items[N]; Ring *next; union { long whole; double part; }; };
struct Flat : Fee { long of(long quantity) const override { return quantity / 100; } Side side; };
struct Tiered : virtual Flat { long of(long quantity) const override; static long tiers; long (Flat::*how)(long) const; };
long Tiered::tiers = 3;
long Tiered::of(long quantity) const { return quantity / tiers; }
Ring<Tiered *, 4> ring;
extern "C" int main(int argc, char **) { static Tiered t; ring.items[argc & 3] = &t; return (int)ring.items[argc & 3]->of(argc); }
