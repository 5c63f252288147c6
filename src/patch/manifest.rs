//! The manifest: what a patch replaces, in JSON.

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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BuildRef {
    /// The GNU build-id.
    pub build_id: HexBytes,
    /// The file name that patch-builder was given, without its folder; for people.
    pub file: String,
}

/// Everything that a patch says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT_VERSION`](super::FORMAT_VERSION) at the time of writing.
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
    /// What was done about types: `not compared` until the contract guard exists.
    pub types: String,
    /// Whether an exception or a panic could cross a frame of this patch (some
    /// function has a language-specific data area or calls one that may throw).
    pub may_unwind: bool,
    /// The `--allow` rules that were needed, each `rule` or `rule:symbol`.
    pub allowances: Vec<String>,
    /// Names of the hooks that the patch exports.
    pub hooks: Vec<String>,
    /// State versions that the patch declares.
    pub states: Vec<StateVersion>,
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
    /// Where it is, as an offset in the patch's own address space.
    pub at: u64,
    /// Its length in bytes.
    pub size: u64,
}

/// A declared version of a piece of state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateVersion {
    /// The state's id.
    pub id: String,
    /// Its version.
    pub version: u32,
}
