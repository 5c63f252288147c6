//! A random program as C, one string a unit.

use std::fmt::Write as _;

use super::program::{Content, Expr, Function, Kind, Program, Stmt};

/// What every unit includes.
pub const HEADER: &str = r#"#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stdarg.h>
typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64; typedef int64_t i64;
struct large { u64 x; int y; double z; };
struct small { u32 x, y; };
#define NOINLINE __attribute__((noinline))
#define COLD __attribute__((cold))
#define RESET 0x5e7a5e7a5e7a5e7aull
#define ASSERT(what, text) do { if (!(what)) failed(__FILE__, __LINE__, __func__, text); } while (0)
void failed(const char *file, int line, const char *function, const char *text);
static inline double of_u64(u64 x) { return (double)(int32_t)x; }
static inline u64 to_u64(double x) { return x > 1e15 || x < -1e15 ? 7 : (u64)(i64)x; }
static inline u64 hash(const char *s) { u64 h = 5381; while (*s) h = h * 33 + (u8)*s++; return h; }
static inline struct large large(u64 x, u64 y) { struct large p = { x, (int)(y & 0xffff), of_u64(x ^ y) }; return p; }
static inline struct small small(u64 x, u64 y) { struct small p = { (u32)x, (u32)y }; return p; }
static inline u64 of_large(struct large p) { return p.x ^ (u64)p.y ^ to_u64(p.z); }
static inline u64 of_small(struct small p) { return (u64)p.x << 32 | p.y; }
u64 median(u64 (*by)(u64, u64), u64 a, u64 b);
"#;

/// The loop: a line of `a b` numbers to a function gives its result and a digest of everything that it may have changed.
pub const MAIN: &str = r#"#include "common.h"
u64 dispatch(u64 id, u64 a, u64 b);
void reset(u64 seed);
u64 digest(void);
void failed(const char *file, int line, const char *function, const char *text) { printf("%s:%d: %s: %s\n", file, line, function, text); exit(9); }
static u64 (*order)(u64, u64);
static int compare(const void *a, const void *b) { u64 x = order(*(const u64 *)a, 3), y = order(*(const u64 *)b, 3); return x < y ? -1 : x > y; }
u64 median(u64 (*by)(u64, u64), u64 a, u64 b) {
  u64 v[5] = { a, b, a + b, a ^ b, 11 };
  order = by;
  qsort(v, 5, sizeof *v, compare);
  return v[2];
}
int main(void) {
  static char line[256];
  while (fgets(line, sizeof line, stdin)) {
    char *at = line + 1;
    u64 x = strtoull(at, &at, 10), a = strtoull(at, &at, 10), b = strtoull(at, &at, 10);
    if (*line == 'r') reset(x);
    if (*line == 'c') { u64 r = dispatch(x, a, b); printf("%llu %llu %llx %llx\n", (unsigned long long)x, (unsigned long long)a, (unsigned long long)r, (unsigned long long)digest()); }
    if (*line == 'f') { puts("."); fflush(stdout); }
  }
  return 0;
}
"#;

const BY_LEVEL: [&str; 6] = ["a", "b", "x0", "x1", "x2", "i"];

/// `(name, text)` of every unit, the header and the loop.
pub fn files(p: &Program) -> Vec<(String, String)> {
    let mut out = vec![("common.h".to_owned(), header(p)), ("main.c".to_owned(), MAIN.to_owned())];
    out.extend((0..p.units).map(|u| (format!("unit{u}.c"), unit(p, u))));
    out.push(("calls.c".to_owned(), calls(p)));
    out
}

fn signature(f: &Function) -> String {
    let name = &f.name;
    match f.kind {
        Kind::Number => format!("u64 {name}(u64 a, u64 b)"),
        Kind::Double => format!("double {name}(double p, u64 b)"),
        Kind::Large => format!("struct large {name}(struct large p, u64 b)"),
        Kind::Small => format!("struct small {name}(struct small p, u64 b)"),
        Kind::Text => format!("const char *{name}(u64 a, u64 b)"),
        Kind::Variadic => format!("u64 {name}(u64 count, ...)"),
    }
}

fn header(p: &Program) -> String {
    let mut out = HEADER.to_owned();
    for s in p.statics.iter().filter(|s| !s.local) {
        let _ = writeln!(out, "extern {}u64 {};", if s.thread_local { "__thread " } else { "" }, s.name);
    }
    for f in p.functions.iter().filter(|f| !f.local) {
        let _ = writeln!(out, "{};", signature(f));
    }
    for u in 0..p.units {
        let _ = writeln!(out, "void reset{u}(u64 seed);\nu64 digest{u}(void);\nu64 local{u}(u64 id, u64 a, u64 b);");
    }
    out
}

fn unit(p: &Program, u: usize) -> String {
    let mut out = String::from("#include \"common.h\"\n");
    for i in 0..p.comment[u] {
        let _ = writeln!(out, "// line {i}");
    }
    for s in p.statics.iter().filter(|s| s.unit == u) {
        let (local, thread) = (if s.local { "static " } else { "" }, if s.thread_local { "__thread " } else { "" });
        let _ = writeln!(out, "{local}{thread}u64 {} = {}ull;", s.name, s.init);
    }
    for f in p.order.iter().map(|i| &p.functions[*i]).filter(|f| f.unit == u && f.local) {
        let _ = writeln!(out, "static {};", signature(f));
    }
    for t in p.tables.iter().filter(|t| t.unit == u) {
        let list = |all: Vec<String>| all.join(", ");
        let _ = match &t.content {
            Content::Numbers(of, v) => {
                writeln!(
                    out,
                    "static const {of} {}[] = {{ {} }};",
                    t.name,
                    list(v.iter().map(|x| format!("{x}ull")).collect())
                )
            }
            Content::Texts(v) => {
                writeln!(
                    out,
                    "static const char *const {}[] = {{ {} }};",
                    t.name,
                    list(v.iter().map(|x| format!("{x:?}")).collect())
                )
            }
            Content::Functions(v) => {
                let names = v.iter().map(|f| p.functions[*f].name.clone()).collect();
                writeln!(out, "static u64 (*const {}[])(u64, u64) = {{ {} }};", t.name, list(names))
            }
        };
    }
    for f in p.order.iter().map(|i| &p.functions[*i]).filter(|f| f.unit == u) {
        function(p, f, &mut out);
    }
    let _ = writeln!(out, "u64 local{u}(u64 id, u64 a, u64 b) {{\n  switch (id) {{");
    for (i, f) in p.functions.iter().enumerate().filter(|(_, f)| f.unit == u && f.local) {
        let _ = writeln!(out, "  case {i}: return {};", call(f, "a", "b"));
    }
    let _ = writeln!(out, "  }}\n  return 0;\n}}\nvoid reset{u}(u64 seed) {{\n  (void)seed;");
    for s in p.statics.iter().filter(|s| s.unit == u && !s.new) {
        let _ = writeln!(out, "  {} = seed = seed * 6364136223846793005ull + 1;", s.name);
    }
    for f in p.functions.iter().filter(|f| f.unit == u && f.own.is_some()) {
        let _ = writeln!(out, "  {}(RESET, seed >> 3);", f.name);
    }
    let _ = writeln!(out, "}}\nu64 digest{u}(void) {{\n  u64 h = {u};");
    for s in p.statics.iter().filter(|s| s.unit == u && !s.new) {
        let _ = writeln!(out, "  h = h * 31 + {};", s.name);
    }
    out += "  return h;\n}\n";
    out
}

/// The unit through which the loop reaches everything.
fn calls(p: &Program) -> String {
    let mut out =
        String::from("#include \"common.h\"\nNOINLINE u64 dispatch(u64 id, u64 a, u64 b) {\n  switch (id) {\n");
    for (i, f) in p.functions.iter().enumerate() {
        let what = if f.local { format!("local{}({i}, a, b)", f.unit) } else { call(f, "a", "b") };
        let _ = writeln!(out, "  case {i}: return {what};");
    }
    out += "  }\n  return 0;\n}\nNOINLINE void reset(u64 seed) {\n";
    for u in 0..p.units {
        let _ = writeln!(out, "  reset{u}(seed + {u});");
    }
    out += "}\nNOINLINE u64 digest(void) {\n  u64 h = 0;\n";
    for u in 0..p.units {
        let _ = writeln!(out, "  h = h * 31 + digest{u}();");
    }
    out += "  return h;\n}\n";
    out
}

fn call(f: &Function, a: &str, b: &str) -> String {
    let name = &f.name;
    match f.kind {
        Kind::Number => format!("{name}({a}, {b})"),
        Kind::Double => format!("to_u64({name}(of_u64({a}), {b}))"),
        Kind::Large => format!("of_large({name}(large({a}, {b}), {b}))"),
        Kind::Small => format!("of_small({name}(small({a}, {b}), {b}))"),
        Kind::Text => format!("hash({name}({a}, {b}))"),
        Kind::Variadic => format!("{name}(3ull, (u64)({a}), (u64)({b}), 9ull)"),
    }
}

fn function(p: &Program, f: &Function, out: &mut String) {
    let local = if f.local { "static " } else { "" };
    let _ = writeln!(out, "{local}{} {} {{", f.attribute, signature(f));
    let _ = match f.kind {
        Kind::Double => writeln!(out, "  u64 a = to_u64(p * 3.0);"),
        Kind::Large => writeln!(out, "  u64 a = of_large(p);"),
        Kind::Small => writeln!(out, "  u64 a = of_small(p);"),
        Kind::Variadic => writeln!(
            out,
            "  u64 a = 0, b = count;\n  va_list all;\n  va_start(all, count);\n  for (u64 n = 0; n < count; n++) a = a * 7 + va_arg(all, u64);\n  va_end(all);"
        ),
        Kind::Number | Kind::Text => Ok(()),
    };
    if let Some(init) = f.own {
        let _ = writeln!(out, "  static u64 own = {init}ull;");
        if f.kind == Kind::Number {
            let _ = writeln!(out, "  if (a == RESET) {{ own = b; return 0; }}");
        }
    }
    let _ = writeln!(out, "  u64 x0 = a ^ 1, x1 = b + 2, x2 = 3, i = 0;");
    block(p, f, &f.body, 1, out);
    let _ = writeln!(out, "  (void)x0; (void)x1; (void)x2; (void)i;\n  {}\n}}", returning(p, f, &f.result));
}

fn returning(p: &Program, f: &Function, e: &Expr) -> String {
    let value = expr(p, e);
    match f.kind {
        Kind::Number | Kind::Variadic => format!("return {value};"),
        Kind::Double => format!("return p * 0.5 + of_u64({value});"),
        Kind::Large => format!("p.x ^= {value}; p.z += 0.25; return p;"),
        Kind::Small => format!("p.x += (u32)({value}); return p;"),
        Kind::Text => {
            format!("{{ u64 r = {value}; return r % 3 == 0 ? \"none\" : r % 3 == 1 ? __func__ : \"order rejected\"; }}")
        }
    }
}

fn block(p: &Program, f: &Function, all: &[Stmt], depth: usize, out: &mut String) {
    let pad = "  ".repeat(depth);
    for s in all {
        let _ = match s {
            Stmt::Assign(v, e) => writeln!(out, "{pad}{} = {};", BY_LEVEL[*v], expr(p, e)),
            Stmt::SetStatic(s, e) => writeln!(out, "{pad}{} += {};", p.statics[*s].name, expr(p, e)),
            Stmt::SetOwn(e) => writeln!(out, "{pad}own = own * 3 + {};", expr(p, e)),
            Stmt::Assert(text) => {
                writeln!(out, "{pad}ASSERT((a ^ x0) != 0x123456789abcdefull || b != 42 || x2 != 99, {text:?});")
            }
            Stmt::Return(e) => writeln!(out, "{pad}{}", returning(p, f, e)),
            Stmt::If(test, then, other) => {
                let _ = writeln!(out, "{pad}if ({}) {{", expr(p, test));
                block(p, f, then, depth + 1, out);
                if !other.is_empty() {
                    let _ = writeln!(out, "{pad}}} else {{");
                    block(p, f, other, depth + 1, out);
                }
                writeln!(out, "{pad}}}")
            }
            Stmt::For(v, bound, body) => {
                let var = BY_LEVEL[*v];
                let _ = writeln!(out, "{pad}for ({var} = 0; {var} < {bound}; {var}++) {{");
                block(p, f, body, depth + 1, out);
                writeln!(out, "{pad}}}")
            }
            Stmt::Switch(test, cases, default) => {
                let labels = cases.iter().map(|(l, _)| l + 1).max().unwrap_or(1) + 1;
                let _ = writeln!(out, "{pad}switch ({} % {labels}) {{", expr(p, test));
                for (label, body) in cases {
                    let _ = writeln!(out, "{pad}case {label}:");
                    block(p, f, body, depth + 1, out);
                    let _ = writeln!(out, "{pad}  break;");
                }
                let _ = writeln!(out, "{pad}default:");
                block(p, f, default, depth + 1, out);
                writeln!(out, "{pad}}}")
            }
        };
    }
}

fn expr(p: &Program, e: &Expr) -> String {
    match e {
        Expr::Const(c) => format!("{c}ull"),
        Expr::Var(v) => BY_LEVEL[*v].to_owned(),
        Expr::Bin(op, a, b) => format!("({} {op} {})", expr(p, a), expr(p, b)),
        Expr::Compare(op, true, a, b) => format!("(u64)((i64){} {op} (i64){})", expr(p, a), expr(p, b)),
        Expr::Compare(op, false, a, b) => format!("(u64)({} {op} {})", expr(p, a), expr(p, b)),
        Expr::Shift(op, a, by) => format!("({} {op} {by})", expr(p, a)),
        Expr::Not(a) => format!("(~{})", expr(p, a)),
        Expr::Table(t, i) => {
            let Content::Numbers(_, v) = &p.tables[*t].content else { return expr(p, i) };
            format!("(u64){}[{} % {}]", p.tables[*t].name, expr(p, i), v.len())
        }
        Expr::Char(t, i) => {
            let Content::Texts(v) = &p.tables[*t].content else { return expr(p, i) };
            format!("hash({}[{} % {}])", p.tables[*t].name, expr(p, i), v.len())
        }
        Expr::Literal(text) => format!("(hash({text:?}) + (a & 1 ? strlen({text:?} + (b & 1)) : 0))"),
        Expr::Call(f, a, b) => call(&p.functions[*f], &expr(p, a), &expr(p, b)),
        Expr::Indirect(t, i, a) => {
            let Content::Functions(v) = &p.tables[*t].content else { return expr(p, i) };
            format!("{}[{} % {}]({}, 3)", p.tables[*t].name, expr(p, i), v.len(), expr(p, a))
        }
        Expr::Float(a, factor, term) => format!("to_u64(of_u64({}) * {factor:?} + {term:?})", expr(p, a)),
        Expr::Static(s) => p.statics[*s].name.clone(),
        Expr::Own => "own".to_owned(),
        Expr::Sorted(f, a, b) => format!("median({}, {}, {})", p.functions[*f].name, expr(p, a), expr(p, b)),
    }
}
