//! The answers for programs that are hard on a differ, at small sizes. What they take at large ones: `benches/worst.rs`.

mod cases;

use cases::{build, Answer, CASES};
use patch_builder::{run, Options};

#[test]
fn hard_programs_get_the_right_answer() {
    let folder = std::env::temp_dir().join(format!("patch-builder-worst-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("the temporary folder is writable");
    for case in CASES {
        let [old, new] = build(case, case.small, &folder);
        let outcome = run(&Options { old, new, name: "fix".into(), ..Options::default() });
        let outcome = outcome.unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let (rules, functions): (Vec<&str>, usize) =
            (outcome.report.refusals.iter().map(|r| r.rule.as_str()).collect(), outcome.report.functions.len());
        match case.answer {
            Answer::Refused(rule) => assert!(rules.contains(&rule), "{}: {rules:?}, not {rule}", case.name),
            Answer::Patch(count) | Answer::PatchAll(count) => {
                let all = if matches!(case.answer, Answer::PatchAll(_)) { case.small } else { 0 };
                assert!(rules.is_empty(), "{}: {:?}", case.name, outcome.report.refusals);
                assert_eq!(functions, count + all, "{}", case.name);
                assert!(outcome.patch.is_some(), "{}", case.name);
            }
        }
    }
    std::fs::remove_dir_all(folder).expect("the folder can be removed");
}
