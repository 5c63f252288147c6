//! What may not change in a running program, as far as it can be told without
//! types: initial values and sizes of data, thread-locals, constructors, and
//! functions that were folded into one.

use crate::build::{demangle, FuncId, ObjId, Object};
use crate::compare::{Comparer, LineProof};
use crate::diff::Diff;
use crate::lift::Target;
use crate::pairing::Pairing;
use crate::report::Refusal;
use crate::side::Side;

/// Every reason to refuse that lies in data, constructors and folding.
#[must_use]
pub fn check(old: &Side<'_>, new: &Side<'_>, pairing: &Pairing, diff: &Diff) -> Vec<Refusal> {
    let mut guard = Guard {
        old,
        new,
        pairing,
        comparer: Comparer::new(old, new, pairing, LineProof::Tables(&diff.lines.0, &diff.lines.1)),
        out: Vec::new(),
    };
    guard.named_data();
    guard.thread_locals();
    guard.constructors(diff);
    guard.folded();
    guard.lost_functions();
    guard.out
}

const RESTART: &str = "data of the running process keeps its value: keep the old one in the source, or restart";

struct Guard<'a, 'd> {
    old: &'a Side<'d>,
    new: &'a Side<'d>,
    pairing: &'a Pairing,
    comparer: Comparer<'a, 'd>,
    out: Vec<Refusal>,
}

impl<'d> Guard<'_, 'd> {
    fn refuse(&mut self, rule: &'static str, symbol: &str, message: String, remedy: &str) {
        let symbol = demangle(symbol);
        let message = message.replace("{}", &symbol);
        let mut remedy = remedy.to_owned();
        if crate::report::ALLOWABLE.contains(&rule) {
            remedy += &format!("; if the change does not matter to what runs: --allow '{rule}:{symbol}'");
        }
        self.out.push(Refusal { rule: rule.into(), symbol, message, remedy, ..Refusal::default() });
    }

    fn named_data(&mut self) {
        for id in 0..self.old.build.objects.len() as ObjId {
            let Some(new_id) = self.pairing.object_pair(id) else { continue };
            let (a, b) = (self.old.build.object(id), self.new.build.object(new_id));
            if a.size == 0 || b.size == 0 {
                continue;
            }
            if self.old.build.section_at(a.addr).is_some_and(|s| s.name.starts_with(".got")) {
                continue;
            }
            let mutable = self.old.is_mutable(a.addr) || self.new.is_mutable(b.addr);
            if !mutable && self.is_code_constant(a) {
                continue; // whoever uses it gets the new one
            }
            if a.size != b.size {
                let message = format!("{{}} has {} bytes in the old build and {} in the new one", a.size, b.size);
                self.refuse("data-size", a.name(), message, RESTART);
            } else if !self.comparer.objects(a.addr, b.addr, a.size) {
                self.refuse("initial-value", a.name(), "the initial value of {} changed".into(), RESTART);
            }
        }
    }

    /// Whether only code refers to a constant, by its own name: then it can be carried anew.
    fn is_code_constant(&self, o: &Object<'d>) -> bool {
        let build = &self.old.build;
        let inside = |to: u64| o.addr <= to && to < o.addr + o.size;
        if o.name().starts_with("_ZTV") || o.name().starts_with("_ZTI") || build.exported.contains(&o.addr) {
            return false;
        }
        let pointers = self.old.pointers_to(o.addr, o.addr.saturating_add(o.size));
        !pointers.iter().any(|p| !p.by_name && !inside(p.at))
    }

    fn thread_locals(&mut self) {
        for id in 0..self.old.build.tls.len() as u32 {
            let Some(new_id) = self.pairing.tls_pair(id) else { continue };
            let (a, b) = (&self.old.build.tls[id as usize], &self.new.build.tls[new_id as usize]);
            let place = |side: &Side<'d>, o: &Object<'d>| side.build.tls_segment.map_or(0, |t| t.addr) + o.addr;
            let (x, y) = (place(self.old, a), place(self.new, b));
            let starts_zero = |side: &Side<'d>, at| side.build.section_at(at).is_none_or(|s| s.zero_fill || !s.tls);
            let same = match (starts_zero(self.old, x), starts_zero(self.new, y)) {
                (true, true) => true,
                (false, false) => a.size == b.size && self.comparer.objects(x, y, a.size),
                _ => false,
            };
            if a.size != b.size || !same {
                let what = if a.size == b.size { "the initial value" } else { "the size" };
                let message = format!("{what} of the thread-local {{}} changed");
                self.refuse("thread-local", a.name(), message, "threads that run already have theirs: restart");
            }
        }
    }

    fn constructors(&mut self, diff: &Diff) {
        let (a, b) = (self.old.start_up(), self.new.start_up());
        const REMEDY: &str = "start-up code has run already and will not run again: leave it as it was, or restart";
        if a.len() != b.len() {
            let message =
                format!("the program has {} constructors and destructors, the new build {}", a.len(), b.len());
            self.refuse("constructor", "init_array", message, REMEDY);
            return;
        }
        for (x, y) in a.into_iter().zip(b.iter().copied()) {
            let name = crate::compare::describe(self.old, x);
            let (changed, moved) = match x {
                Target::Func(f, _) => {
                    let pair = self.pairing.func_pair(f).map(|g| Target::Func(g, 0));
                    (diff.changed.contains_key(&f), pair.is_some_and(|g| y != g && b.contains(&g)))
                }
                _ => (false, false),
            };
            if changed || !self.comparer.targets(x, y, crate::lift::Access::Extent) {
                // Equal code in another order may leave other data behind.
                let what = if moved && !changed {
                    "runs in another order at start-up"
                } else {
                    "runs at start-up and changed"
                };
                self.refuse("constructor", &name, format!("{{}} {what}"), REMEDY);
            }
        }
    }

    /// Functions of which nobody can say what became of them, while something holds their address.
    fn lost_functions(&mut self) {
        for (f, name) in &self.pairing.ambiguous_functions {
            if self.is_held(*f) {
                let message = "it can't be told which new function {} is, and the program holds its address".into();
                self.refuse("ambiguous", name, message, "give the functions different names, or change one at a time");
            }
        }
    }

    /// Whether code or data of the old build holds the address of a function.
    fn is_held(&self, id: FuncId) -> bool {
        let build = &self.old.build;
        let at = build.func(id).addr;
        let in_code = self.old.callers(id).iter().any(|caller| {
            let refs = &self.old.lifted[*caller as usize].refs;
            refs.iter().any(|r| r.target == Target::Func(id, 0) && Side::takes_address(r.access))
        });
        in_code || build.exported.contains(&at) || !self.old.pointers_to(at, at + 1).is_empty()
    }

    fn folded(&mut self) {
        for (f, g, h) in self.pairing.splits.clone() {
            if self.comparer.func_bodies(f, g) && self.comparer.func_bodies(f, h) {
                continue;
            }
            let names: Vec<String> = self.old.build.func(f).names.iter().map(|n| demangle(n.text)).collect();
            let message =
                format!("{} are one function in the old build (folded) and differ in the new one", names.join(" and "));
            let name = self.old.build.func(f).name();
            self.refuse("icf", name, message, "build both without folding (no --icf, -fno-ipa-icf)");
        }
    }
}
