//! How two records of builds differ, and what that costs.

use std::collections::BTreeSet;

use crate::store::Record;

/// Code generation flags of a compiler's command line, without those that name places or single crates.
#[must_use]
pub fn flags(command: &[String]) -> Vec<String> {
    const PLACES: [&str; 7] =
        ["metadata=", "extra-filename=", "incremental=", "link-arg=", "link-args=", "linker=", "dlltool="];
    let mut out = Vec::new();
    let mut at = command.iter();
    while let Some(arg) = at.next() {
        let flag = match arg.as_str() {
            "-C" | "--codegen" => at.next().cloned(),
            "--cfg" => at.next().map(|v| format!("cfg {v}")),
            "--edition" => at.next().map(|v| format!("edition={v}")),
            "--target" => at.next().map(|v| format!("target={v}")),
            _ => arg
                .strip_prefix("-C")
                .map(str::to_owned)
                .or_else(|| arg.strip_prefix("--").filter(|a| a.starts_with("edition=")).map(str::to_owned)),
        };
        out.extend(flag.filter(|f| !PLACES.iter().any(|p| f.starts_with(p))));
    }
    out
}

/// What differs between the builds, other than the sources.
#[must_use]
pub fn warnings(old: &Record, new: &Record) -> Vec<String> {
    let mut out = Vec::new();
    let version = |r: &Record| r.compiler.lines().next().unwrap_or("unknown").to_owned();
    if old.compiler != new.compiler {
        out.push(format!(
            "another compiler ({}, then {}): far more functions differ than were edited; build with the old one",
            version(old),
            version(new)
        ));
    }
    if let (Some(o), Some(n)) = (&old.cargo, &new.cargo) {
        if o.profile != n.profile {
            out.push(format!(
                "another profile ({}, then {}): code is optimised differently, and most functions differ; build with --profile {}",
                o.profile, n.profile, o.profile
            ));
        }
        if o.args != n.args {
            out.push(format!(
                "other features or options ({}, then {}): what they switch counts as a change",
                shown(&o.args),
                shown(&n.args)
            ));
        }
        let (of, nf): (BTreeSet<_>, BTreeSet<_>) = (o.flags.iter().collect(), n.flags.iter().collect());
        if o.profile == n.profile && o.args == n.args && of != nf {
            let only = |a: &BTreeSet<&String>, b: &BTreeSet<&String>| {
                shown(&a.difference(b).map(|s| (*s).clone()).collect::<Vec<_>>())
            };
            out.push(format!(
                "other flags ({}, then {}): code may be generated differently everywhere; compare RUSTFLAGS, Cargo.toml and .cargo/config.toml",
                only(&of, &nf),
                only(&nf, &of)
            ));
        }
        if o.paths != n.paths {
            out.push("other paths in the images: panic messages that hold them count as changes".into());
        }
    }
    if let (Some(o), Some(n)) = (&old.lock, &new.lock) {
        if o.sha256 != n.sha256 {
            out.push("another Cargo.lock: changed dependencies are part of the patch; compare the two files".into());
        }
    }
    out
}

fn shown(list: &[String]) -> String {
    if list.is_empty() {
        return "none".into();
    }
    list.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{CargoBuild, FileInfo};

    #[test]
    fn flags_name_how_code_is_made_and_not_where() {
        let line = "rustc --crate-name x --edition=2021 -C opt-level=3 -Cmetadata=1 -C extra-filename=-1 -Clink-arg=-Wl,-Map=/x --cfg feature=\"a\" -Cpanic=abort";
        let line: Vec<String> = line.split(' ').map(str::to_owned).collect();
        assert_eq!(flags(&line), ["edition=2021", "opt-level=3", "cfg feature=\"a\"", "panic=abort"]);
    }

    #[test]
    fn each_difference_is_said_with_its_cost() {
        let build = |profile: &str, flag: &str| {
            let flags = vec![flag.to_owned()];
            let cargo = CargoBuild { profile: profile.into(), flags, ..CargoBuild::default() };
            let lock = FileInfo { sha256: flag.into(), ..FileInfo::default() };
            Record { compiler: "rustc 1".into(), cargo: Some(cargo), lock: Some(lock), ..Record::default() }
        };
        let same = build("release", "opt-level=3");
        assert!(warnings(&same, &same).is_empty());
        assert!(warnings(&same, &build("fast", "opt-level=3"))[0].contains("--profile release"));
        let said = warnings(&same, &Record { compiler: "rustc 2".into(), ..build("release", "opt-level=2") });
        assert_eq!(said.len(), 3, "{said:?}");
        assert!(said[0].contains("rustc 2") && said[1].contains("opt-level=2") && said[2].contains("Cargo.lock"));
    }
}
