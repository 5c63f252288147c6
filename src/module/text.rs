//! The text that a module carries: what interface it is of, how all that crosses it is laid out, what it declares of itself.

use std::fmt;

use sha2::{Digest, Sha256};

/// Longer than any interface.
const MAX_BYTES: usize = 1 << 20;

/// A text that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    lines: Vec<String>,
    allowed: Vec<String>,
    state: Option<u32>,
    bytes: Vec<u8>,
}

impl Description {
    /// Reads the text. Lines that stand in it several times count once.
    ///
    /// # Errors
    ///
    /// It is none, or one of another version of the format.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let bytes = text.to_vec();
        if text.len() > MAX_BYTES {
            return Err(format!("it is {} bytes long", text.len()));
        }
        let text = std::str::from_utf8(text).map_err(|_| "it is no text".to_owned())?;
        let mut given = text.trim_end_matches('\0').lines();
        match given.next() {
            Some(livepatch_interface::TEXT_HEAD) => {}
            head => return Err(format!("it begins with {head:?}, not {:?}", livepatch_interface::TEXT_HEAD)),
        }
        let (mut lines, mut allowed) = (Vec::new(), Vec::new());
        let mut state = None;
        let mut seen = std::collections::HashSet::new();
        for line in given.filter(|l| seen.insert(*l)) {
            match (line.split_once(' '), lines.is_empty()) {
                (Some(("interface", _)), true) | (Some(("fn" | "type", _)), false) => lines.push(line.to_owned()),
                (Some(("allow", what)), false) => allowed.push(what.to_owned()),
                (Some(("state", version)), false) if version.parse::<u32>().is_ok() => state = version.parse().ok(),
                _ => return Err(format!("it has a line that says nothing here: {line:?}")),
            }
        }
        if lines.is_empty() {
            return Err("it names no interface".into());
        }
        Ok(Self { lines, allowed, state, bytes })
    }

    /// The text as it was given.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The version of a module's state.
    #[must_use]
    pub fn state(&self) -> Option<u32> {
        self.state
    }

    /// The interface's name and version.
    #[must_use]
    pub fn interface(&self) -> (&str, &str) {
        let first = self.lines.first().and_then(|l| l.strip_prefix("interface ")).unwrap_or("");
        first.rsplit_once(' ').unwrap_or((first, ""))
    }

    /// SHA-256 of functions and layouts, without name and version: what a lock of the interface holds.
    #[must_use]
    pub fn digest(&self) -> String {
        let mut sha = Sha256::new();
        self.lines.iter().skip(1).for_each(|line| sha.update(format!("{line}\n")));
        sha.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Whether the module declares this of itself: `static`, `thread-local`, `constructor`, `destructor` or `library`, and a name.
    #[must_use]
    pub fn allows(&self, kind: &str, name: &str) -> bool {
        let given = self.allowed.iter().filter_map(|a| a.strip_prefix(kind)?.strip_prefix(' '));
        given.into_iter().any(|allowed| name.strip_prefix(allowed).is_some_and(|r| r.is_empty() || r.starts_with("::")))
    }

    /// What one has and the other has not; `None` if functions and layouts are the same, in the same order. A module of a later minor version of
    /// the same interface is the same.
    #[must_use]
    pub fn differs(&self, other: &Self) -> Option<Difference> {
        let major = |d: &Self| (d.interface().0.to_owned(), d.interface().1.split('.').next().map(str::to_owned));
        if self.lines.iter().skip(1).eq(other.lines.iter().skip(1)) && major(self) == major(other) {
            return None;
        }
        let only = |a: &Self, b: &Self| {
            let functions = |d: &Self| d.lines.iter().filter(|l| l.starts_with("fn ")).cloned().collect::<Vec<_>>();
            // Where only the order of functions is another, every one of them is shown.
            let order = functions(a) != functions(b);
            let shown = |l: &&String| !b.lines.contains(l) || (order && l.starts_with("fn "));
            a.lines.iter().filter(shown).cloned().collect::<Vec<_>>()
        };
        Some(Difference { program: only(self, other), module: only(other, self) })
    }
}

/// How two interfaces differ: lines of their texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// What the program calls.
    pub program: Vec<String>,
    /// What the module offers.
    pub module: Vec<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (who, lines) in [("the program calls", &self.program), ("the module offers", &self.module)] {
            write!(f, "\n  {who}")?;
            lines.iter().try_for_each(|line| write!(f, "\n    {line}"))?;
        }
        Ok(())
    }
}
