//! What the report says of real builds: reasons, values, hunks, warnings, what was not compared.

mod pairs;

use pairs::{of_change, report, Folder, SERVER};
use patch_builder::report::{Evidence, FunctionInfo, Report, Why};
use patch_builder::{run, Options};

#[track_caller]
fn function<'r>(report: &'r Report, name: &str) -> &'r FunctionInfo {
    let names: Vec<_> = report.functions.iter().map(|f| &f.name).collect();
    report.functions.iter().find(|f| f.name == name).unwrap_or_else(|| panic!("no {name} in {names:?}"))
}

#[test]
fn a_change_of_its_own_source_is_shown_as_a_hunk() {
    let report = of_change("own", "return n + 1;", "return n + 2;");
    let f = function(&report, "wait_once");
    assert!(
        matches!(&f.why[..], [Why::Source { at: Some(at), evidence: Evidence::Text }] if at == "server.c:23"),
        "{:?}",
        f.why
    );
    let hunk = f.hunk.as_deref().expect("both texts are at hand");
    assert!(
        hunk.contains("@@ -24,5 +24,5 @@") && hunk.contains("\n-    return n + 1;\n+    return n + 2;\n"),
        "{hunk}"
    );
    assert!(f.entry_jump && f.entry.contains("unchanged code calls it"), "{}", f.entry);
    assert!(report.may_never_leave.is_empty(), "it waits, but does not stay: {:?}", report.may_never_leave);
}

#[test]
fn an_inlined_function_is_named_with_its_call() {
    let report = of_change("inlined", "n * 70", "n * 75");
    let f = function(&report, "charge");
    let [Why::Inlined { callee, called_at, declared_at, evidence: Evidence::Text }] = &f.why[..] else {
        panic!("{:?}", f.why)
    };
    assert_eq!(
        (callee.as_str(), called_at.as_deref(), declared_at.as_deref()),
        ("fee", Some("server.c:15"), Some("server.c:9"))
    );
    assert!(f.hunk.as_deref().is_some_and(|h| h.contains("+    return n * 75 / 10000;")), "{:?}", f.hunk);
}

#[test]
fn a_text_is_said_with_both_values() {
    let report = of_change("text", "fee %ld", "the fee is %ld");
    let constant = function(&report, "show").why.iter().find(|w| matches!(w, Why::Constant { .. }));
    let Some(Why::Constant { old: Some(old), new: Some(new), .. }) = constant else { panic!("{constant:?}") };
    assert_eq!((old.as_str(), new.as_str()), ("\"fee %ld\\n\"", "\"the fee is %ld\\n\""));
}

#[test]
fn where_both_were_built_at_one_path_the_old_text_is_said_to_be_gone() {
    let folder = Folder::new("one-path");
    let old = folder.build("at", SERVER, &["-g"]);
    let kept = folder.0.join("kept");
    std::fs::rename(old, &kept).expect("one folder");
    let new = folder.build("at", &SERVER.replace("return n + 1;", "return n + 2;"), &["-g"]);
    let report = report(&kept, &new);
    let f = function(&report, "wait_once");
    assert!(matches!(f.why[..], [Why::Source { evidence: Evidence::Code, .. }]), "{:?}", f.why);
    assert!(f.hunk.as_deref().is_some_and(|h| h.contains(">    26  ") || h.contains("return n + 2;")), "{:?}", f.hunk);
    assert!(f.hunk_note.as_deref().is_some_and(|n| n.contains("--old-source")), "{:?}", f.hunk_note);
    let elsewhere = folder.0.join("old-tree");
    std::fs::create_dir_all(&elsewhere).expect("the folder is writable");
    std::fs::write(elsewhere.join("server.c"), SERVER).expect("the folder is writable");
    let options = Options { old: kept, new, sources: (Some(elsewhere), None), only_report: true, ..Options::default() };
    let report = run(&options).expect("they differ").report;
    let f = function(&report, "wait_once");
    assert!(matches!(f.why[..], [Why::Source { evidence: Evidence::Text, .. }]), "{:?}", f.why);
    assert!(f.hunk.as_deref().is_some_and(|h| h.contains("-    return n + 1;")), "{:?}", f.hunk);
}

#[test]
fn without_debug_information_no_reason_is_made_up() {
    let folder = Folder::new("blind");
    let (old, new) = (folder.build("old", SERVER, &[]), folder.build("new", &SERVER.replace("n + 1", "n + 2"), &[]));
    let report = report(&old, &new);
    let f = function(&report, "wait_once");
    assert!(!f.why.iter().any(|w| matches!(w, Why::Source { .. } | Why::Inlined { .. })), "{:?}", f.why);
    let difference = f.difference.as_ref().expect("one instruction differs");
    assert_ne!(difference.old, difference.new);
    let blind = report.not_compared.iter().find(|n| n.what == "debug-information").expect("it is said");
    assert_eq!(blind.count, 2);
}

#[test]
fn what_a_thread_may_never_leave_is_warned_of() {
    for (name, from, to, want, kind, instead) in [
        ("loop", "== 42", "== 43", "event_loop", "event-loop", "handle"),
        ("thread", "usleep(1000)", "usleep(2000)", "worker", "thread-start", "charge"),
        ("main", "argc == 7", "argc == 8", "main", "main", "event_loop"),
    ] {
        let report = of_change(name, from, to);
        let [never] = &report.may_never_leave[..] else { panic!("{name}: {:?}", report.may_never_leave) };
        assert_eq!((never.function.as_str(), never.kind), (want, kind));
        assert!(never.instead.iter().any(|i| i == instead), "{name}: {never:?}");
        assert!(never.remedy.contains("--consistency entry"), "{never:?}");
        assert!(report.warnings[0].starts_with(&format!("{want} may never be off the stack")), "{:?}", report.warnings);
    }
}

#[test]
fn what_calls_a_wait_without_staying_is_not_warned_of() {
    for (name, from, to) in [
        ("retry", "return n + 1;", "return n + 2;"),
        ("loop-without-wait", "return s + 1", "return s + 2"),
        ("called-by-a-loop", "+ sum(n); }", "+ sum(n) + 1; }"),
        ("called-by-a-thread", "return total;", "return total + 1;"),
    ] {
        let report = of_change(name, from, to);
        assert!(!report.functions.is_empty(), "{name}");
        assert!(report.may_never_leave.is_empty(), "{name}: {:?}", report.may_never_leave);
    }
}

#[test]
fn a_changed_layout_is_named() {
    let with = |members: &str| {
        SERVER
            .replace("long total;", &format!("struct order {{ {members} long qty; }};\nlong total;"))
            .replace("OUT int sum(int n)\n{", "OUT long qty(struct order *o)\n{\n    return o->qty;\n}\nOUT int sum(int n)\n{\n    struct order o = { .qty = n };\n    total += qty(&o);")
    };
    let folder = Folder::new("layout");
    let (old, new) =
        (folder.build("old", &with("long id;"), &["-g"]), folder.build("new", &with("long id; long fee;"), &["-g"]));
    let report = report(&old, &new);
    let f = function(&report, "qty");
    assert!(f.why.iter().any(|w| matches!(w, Why::Layout { name } if name.contains("order"))), "{:?}", f.why);
    assert!(f.reason.contains("layout of"), "{}", f.reason);
}
