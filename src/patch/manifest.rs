//! The manifest: what a patch replaces and needs, in JSON. Format 3; a manifest of format 2 is one without `linked` and `together`, and
//! [`v1`](super::v1) reads the one before.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::addr::ImageAddr;

/// Bytes, written as lower-case hex.
#[derive(Clone, Debug, PartialEq, Eq, Default, Hash)]
pub struct HexBytes(pub Vec<u8>);

impl HexBytes {
    /// The bytes of a hex string, or `None` if it is none.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        if !text.is_ascii() || !text.len().is_multiple_of(2) {
            return None;
        }
        (0..text.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(text.get(i..i + 2)?, 16).ok())
            .collect::<Option<_>>()
            .map(Self)
    }
}

impl std::fmt::Display for HexBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl Serialize for HexBytes {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HexBytes {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Self::from_hex(&text).ok_or_else(|| serde::de::Error::custom(format!("{text:?} is not hex")))
    }
}

/// One build, by its GNU build-id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BuildRef {
    /// The GNU build-id.
    pub build_id: HexBytes,
    /// The file name that patch-builder was given, without its folder; for people.
    pub file: String,
}

/// Everything that a patch says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The version of the format that the file was written in.
    pub format: u32,
    /// The patch's name.
    pub name: String,
    /// Which patch-builder wrote it.
    pub builder: String,
    /// The build whose running image the patch is for.
    pub target: BuildRef,
    /// The build that the replacement code was taken from.
    pub new: BuildRef,
    /// Every function that the patch brings, in the order of their place in the patch.
    pub functions: Vec<Function>,
    /// New static data that the patch brings.
    pub statics: Vec<Static>,
    /// What was done about types.
    pub types: String,
    /// Whether an exception or a panic could cross a frame of this patch (some
    /// function has a language-specific data area or calls one that may throw).
    pub may_unwind: bool,
    /// The `--allow` rules that were needed, each `rule` or `rule:symbol`.
    pub allowances: Vec<String>,
    /// What the patch needs of libraries that the old build does not import; relocations refer to it by symbol.
    pub imports: Vec<Import>,
    /// The patch that this one takes the place of.
    pub after: Option<After>,
    /// New functions of that patch whose address somebody may hold: they get a jump, too.
    pub redirects: Vec<Redirect>,
    /// Functions of the patch that the engine calls around apply and revert.
    pub hooks: Vec<Hook>,
    /// State versions that the patch declares.
    pub states: Vec<StateVersion>,
    /// The layouts of types that the patch brings: a later patch is held against them.
    pub layouts: Vec<TypeLayout>,
    /// What old and new code of the patch do not agree on, types with another layout above all: they must not run side by
    /// side. `None` in formats that did not record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub together: Option<Vec<String>>,
    /// What the old build has linked into itself; `None` in formats that did not record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub linked: Option<Linked>,
}

/// Parts of a run-time library that the old build has linked into itself: no table in the memory of a static program tells of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linked {
    /// Its functions that switch a thread to another stack (`swapcontext` and the like).
    pub stack_switches: Vec<String>,
    /// `__register_frame` of libgcc.
    pub register_frame: Option<ImageAddr>,
    /// Its functions in which a thread waits without a lock of theirs.
    pub waits: Vec<CodeRange>,
    /// All code that was compiled without debug information: that of the C library and of the unwinder, above all.
    pub runtime: Vec<CodeRange>,
}

/// Code of the old image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CodeRange {
    /// Its first byte.
    pub at: ImageAddr,
    /// Its length in bytes.
    pub size: u64,
}

/// Something of a library that the patch needs and the old build does not import.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Import {
    /// Its symbol, without version.
    pub name: String,
    /// The version that the new build was linked to; `None` if the library has no versions.
    pub version: Option<String>,
    /// The library that the version belongs to, as the new build names it (`libc.so.6`); `None` without version.
    pub library: Option<String>,
    /// Function or variable.
    pub kind: ImportKind,
    /// Whether it may be missing: then its address is 0.
    pub weak: bool,
}

impl Import {
    /// As the symbol table of the patch and every message have it: `name`, or `name@version`.
    #[must_use]
    pub fn symbol(&self) -> String {
        match &self.version {
            Some(version) => format!("{}@{version}", self.name),
            None => self.name.clone(),
        }
    }
}

/// What an import is used as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImportKind {
    /// It is called, or its address is taken.
    Function,
    /// It is read or written.
    Variable,
}

/// The patch that this one takes the place of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct After {
    /// Its name; for people.
    pub name: String,
    /// The digest of its file.
    pub digest: HexBytes,
    /// The patches before it, whose places were taken in turn, the last one first: what they brought may be alive, too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub before: Vec<Before>,
}

/// A patch whose place was taken before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Before {
    /// Its name; for people.
    pub name: String,
    /// The digest of its file.
    pub digest: HexBytes,
}

/// A new function of the previous patch that leads to one of this patch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Redirect {
    /// Its symbol.
    pub name: String,
    /// Where it begins in the previous patch's address space, behind `endbr64`; or in that of one before
    /// ([`in_chain`](super::in_chain)).
    pub at: u64,
    /// The same with its `endbr64`: the address that the process knows. `None` in formats that did not record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<u64>,
    /// Its bytes from there on.
    pub size: u64,
    /// Where it leads, in this patch's address space.
    pub new_at: u64,
}

/// When a hook runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HookKind {
    /// Before the entries are written; it may refuse.
    PreApply,
    /// After that.
    PostApply,
    /// Before the entries are given back.
    PreRevert,
    /// After that.
    PostRevert,
}

impl HookKind {
    /// All of them, in the order in which they run.
    pub const ALL: [Self; 4] = [Self::PreApply, Self::PostApply, Self::PreRevert, Self::PostRevert];

    /// The one spelling under which a hook is exported.
    #[must_use]
    pub fn symbol(self) -> &'static str {
        match self {
            Self::PreApply => "livepatch_pre_apply",
            Self::PostApply => "livepatch_post_apply",
            Self::PreRevert => "livepatch_pre_revert",
            Self::PostRevert => "livepatch_post_revert",
        }
    }
}

/// Room for the text that a hook may leave, in bytes: a C string.
pub const HOOK_TEXT_BYTES: u64 = 1024;

/// A function `int (*)(char *why, size_t room)` that the engine calls; anything but 0 means no, and `why` then says so in words, if the
/// function has any. It may be declared without parameters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    /// When.
    pub kind: HookKind,
    /// Its symbol, [`HookKind::symbol`].
    pub symbol: String,
    /// Where it begins, as an offset in the patch's own address space.
    pub at: u64,
    /// Whether it needs the agent: more than a thread of its own.
    pub agent: bool,
}

/// The layout of a type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TypeLayout {
    /// Its name.
    pub name: String,
    /// Digest of the layout with everything that it consists of.
    pub digest: HexBytes,
    /// The layout, for people.
    pub layout: String,
}

/// Whether a function replaces one of the old build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// It replaces an old function.
    Changed,
    /// The old build has no such function.
    New,
}

/// One function of the patch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Function {
    /// Its symbol.
    pub name: String,
    /// The same, readable.
    pub demangled: String,
    /// Whether it replaces an old one.
    pub status: Status,
    /// Why it is in the patch.
    pub reason: String,
    /// Where the new code is, as an offset in the patch's own address space (from 0).
    pub new_at: u64,
    /// Bytes of the new code.
    pub new_size: u64,
    /// The `file:line` it starts at, if the line table says.
    pub source: Option<String>,
    /// Whether its address may be held by somebody after the patch was applied.
    pub address_taken: bool,
    /// What it replaces; `None` exactly if `status` is [`Status::New`].
    pub old: Option<OldFunction>,
}

/// The old version of a replaced function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OldFunction {
    /// Its first instruction.
    pub at: ImageAddr,
    /// Its length in bytes.
    pub size: u64,
    /// SHA-256 of its bytes in the old image.
    pub sha256: HexBytes,
    /// Whether one of its own instructions branches back to its first one.
    pub branches_to_entry: bool,
    /// Its out-of-line parts (`.cold`, `.part.N`); they get no entry jump.
    pub companions: Vec<Companion>,
    /// The entry jump, unless only code of this patch can reach the function.
    pub entry: Option<Entry>,
    /// The entry jump of a function that only this patch reaches: for when old callers of it may go on. It has the old contract.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry_beside: Option<Entry>,
}

impl OldFunction {
    /// Its entry jump, for whichever consistency it is.
    #[must_use]
    pub fn any_entry(&self) -> Option<&Entry> {
        self.entry.as_ref().or(self.entry_beside.as_ref())
    }
}

/// An out-of-line part of an old function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Companion {
    /// Its symbol.
    pub name: String,
    /// Its first byte.
    pub at: ImageAddr,
    /// Its length in bytes.
    pub size: u64,
    /// SHA-256 of its bytes in the old image.
    pub sha256: HexBytes,
}

/// Where an entry jump goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The first byte it overwrites: the function's first, or the one after its `endbr64`.
    pub at: ImageAddr,
    /// The bytes that stand there in the old image, [`ENTRY_JUMP_LEN`](super::ENTRY_JUMP_LEN) of them.
    pub original: HexBytes,
    /// How many of them are padding after the function's end.
    pub padding: u64,
}

/// New static data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Static {
    /// Its symbol.
    pub name: String,
    /// The source file it belongs to, for a local symbol.
    pub file: Option<String>,
    /// Where it is, as an offset in the patch's own address space; or, one that an earlier patch brought and that is alive, in that one's
    /// ([`in_chain`](super::in_chain)).
    pub at: u64,
    /// Its length in bytes.
    pub size: u64,
    /// Digest of its type's layout, if it is known.
    pub type_digest: Option<HexBytes>,
}

/// A declared version of a piece of state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateVersion {
    /// The state's id.
    pub id: String,
    /// Its version in the new build.
    pub version: u32,
    /// Its version in the old build; `None` if that has no such state, and in formats that did not record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<u32>,
}

impl StateVersion {
    /// Whether the patch migrates it.
    #[must_use]
    pub fn migrates(&self) -> bool {
        self.from.is_some_and(|from| from != self.version)
    }
}
