//! What commands and agents say to each other: frames over a Unix socket.
//!
//! A connection carries one request and one answer. Each is a frame:
//!
//! | bytes | what they are |
//! | --- | --- |
//! | 0 to 3 | `LPAG` |
//! | 4, 5 | the version of the protocol, little-endian |
//! | 6, 7 | zero |
//! | 8 to 11 | the length of the body, little-endian |
//! | from 12 | the body, in JSON |
//!
//! The first 12 bytes are the same in every version, so that either side can say what it does not speak. A patch never travels as a
//! path, which the agent may see differently and somebody may replace: it comes as a descriptor of sealed memory
//! ([`SealedPatch`](super::sealed::SealedPatch)) with the first bytes of the request.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

use crate::patcher::{CheckReport, Error, Options, ProcessStatus, Report};

/// The version of the protocol that this side speaks.
pub const VERSION: u16 = 1;

/// The longest body of a request.
pub const MAX_REQUEST: usize = 1 << 20;

/// The longest body of an answer.
pub const MAX_ANSWER: usize = 16 << 20;

/// The bytes before the body.
pub const HEADER_BYTES: usize = 12;

const MAGIC: &[u8; 4] = b"LPAG";

/// The longest time that a request may name: far from where adding it to a clock's time overflows.
const MAX_TIME: Duration = Duration::from_secs(366 * 24 * 3600);

/// All of the calls, in 1/10,000.
const WHOLE: u32 = 10_000;

/// The longest patch's name, and the longest signature; both are short.
const MAX_NAME: usize = 4096;
const MAX_SIGNATURE: usize = 64 << 10;

/// What is wrong with a message.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// It does not begin as every message does.
    #[error("that is no message of livepatch")]
    Magic,
    /// It is of another version.
    #[error("it speaks version {theirs} of the protocol, and this side version {VERSION}: command and agent have to be of releases that fit")]
    Version {
        /// Its version.
        theirs: u16,
    },
    /// It is too long.
    #[error("a message of {len_bytes} bytes, where {max_bytes} are the most")]
    TooLong {
        /// Its length.
        len_bytes: usize,
        /// The greatest that there may be.
        max_bytes: usize,
    },
    /// It ends too early.
    #[error("the message ends in its middle")]
    CutOff,
    /// It goes on too long.
    #[error("the message goes on after its end")]
    Trailing,
    /// The body is not what was agreed on.
    #[error("the message cannot be understood: {0}")]
    Body(String),
    /// A value in it is out of bounds.
    #[error("{0}")]
    Value(&'static str),
    /// What came with it is no patch.
    #[error("{0}")]
    Descriptor(String),
}

/// What a command asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Who is there?
    Info,
    /// Would the patch apply now? The patch comes as a descriptor.
    Check(Given),
    /// Apply the patch, which comes as a descriptor. Where `confirm_within` is given, the agent reverts it when nobody has confirmed
    /// it by then.
    Apply(Given),
    /// Revert.
    Revert {
        /// This patch, if it is the newest; else the newest.
        name: Option<String>,
        /// All patches.
        all: bool,
        /// How.
        options: Options,
    },
    /// What is applied?
    Status,
    /// Let this share of the calls run an applied canary.
    Canary {
        /// The patch.
        name: String,
        /// The share, in 1/10,000.
        share: u32,
    },
    /// Make an applied patch permanent.
    Confirm {
        /// The patch.
        name: String,
    },
}

/// How to apply a patch, and who signed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Given {
    /// How. What `signed` says is what the command found; an agent with keys of its own goes by `signature`.
    pub options: Options,
    /// The text of the patch's detached signature, where there is one.
    pub signature: Option<String>,
}

impl Request {
    /// Whether a patch has to come with it.
    #[must_use]
    pub fn takes_patch(&self) -> bool {
        matches!(self, Self::Check(_) | Self::Apply(_))
    }

    /// As a frame.
    ///
    /// # Errors
    ///
    /// A value in it is out of bounds, or it is too long.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        self.validate()?;
        frame(self, MAX_REQUEST)
    }

    /// From the body of a frame.
    ///
    /// # Errors
    ///
    /// It is no request, or a value in it is out of bounds.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let request: Self = serde_json::from_slice(body).map_err(|e| WireError::Body(e.to_string()))?;
        request.validate()?;
        Ok(request)
    }

    fn validate(&self) -> Result<(), WireError> {
        let named = |name: &str| match name.len() {
            1..=MAX_NAME => Ok(()),
            _ => Err(WireError::Value("that is no name of a patch")),
        };
        match self {
            Self::Check(given) | Self::Apply(given) => {
                if given.signature.as_ref().is_some_and(|s| s.len() > MAX_SIGNATURE) {
                    return Err(WireError::Value("that is too long for a signature"));
                }
                bounded(&given.options)
            }
            Self::Revert { name, all, options } => {
                if *all && name.is_some() {
                    return Err(WireError::Value("a patch's name or all, not both"));
                }
                name.as_deref().map_or(Ok(()), named)?;
                bounded(options)
            }
            Self::Canary { name, share } => {
                named(name)?;
                if *share > WHOLE {
                    return Err(WireError::Value("a share of more than 100 %"));
                }
                Ok(())
            }
            Self::Confirm { name } => named(name),
            Self::Info | Self::Status => Ok(()),
        }
    }
}

fn bounded(options: &Options) -> Result<(), WireError> {
    let times = [Some(options.timeout), Some(options.hold), options.confirm_within];
    if times.into_iter().flatten().any(|t| t > MAX_TIME) {
        return Err(WireError::Value("a time of more than a year"));
    }
    if options.canary.as_ref().is_some_and(|c| c.share > WHOLE) {
        return Err(WireError::Value("a share of more than 100 %"));
    }
    Ok(())
}

/// What an agent answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Answer {
    /// To [`Request::Info`].
    Info(Info),
    /// To [`Request::Check`].
    Check(CheckReport),
    /// To [`Request::Apply`] and [`Request::Revert`].
    Reports(Vec<Report>),
    /// To [`Request::Status`].
    Status(ProcessStatus),
    /// It is done, and there is no more to say.
    Done,
    /// It is not done.
    Failed(Failure),
    /// Only the hold from outside can do this; nothing was changed.
    Outside {
        /// Why.
        why: String,
    },
}

/// Who answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Info {
    /// The process, as it sees itself.
    pub pid: i32,
    /// The version of livepatch that is linked in.
    pub version: String,
    /// Whether it takes signed patches only.
    pub requires_signature: bool,
    /// Why it cannot switch from inside now, if that is so.
    pub outside: Option<String>,
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// The exit code of a command that ends with this.
    pub exit: u8,
    /// What kind it is, as far as a command has to tell them apart.
    pub kind: FailureKind,
    /// For people.
    pub message: String,
    /// For programs: what `--json` prints.
    pub json: Value,
}

/// The kinds of failures that a command tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// No patch is applied.
    NothingApplied,
    /// No patch of that name is.
    NoSuchPatch,
    /// A no with its reason.
    Refused,
    /// Some thread stayed where it must not be.
    NotQuiescent,
    /// Anything else.
    Other,
}

impl Failure {
    /// How a use case ended in process `pid`.
    #[must_use]
    pub fn of(pid: i32, error: &Error) -> Self {
        let kind = match error.first() {
            Error::NothingApplied { .. } => FailureKind::NothingApplied,
            Error::NoSuchPatch { .. } => FailureKind::NoSuchPatch,
            Error::Refused { .. } | Error::RefusedFor(_) => FailureKind::Refused,
            Error::NotQuiescent(_) => FailureKind::NotQuiescent,
            _ => FailureKind::Other,
        };
        Self { exit: error.exit_code(), kind, message: error.to_string(), json: error.to_json(Some(pid)) }
    }

    /// Anything else that went wrong.
    #[must_use]
    pub fn other(exit: u8, message: impl Into<String>) -> Self {
        let message = message.into();
        let json = json!({"pid": std::process::id(), "error": {"message": message, "exit": exit}});
        Self { exit, kind: FailureKind::Other, message, json }
    }
}

impl Answer {
    /// As a frame. One that is too long becomes a failure that says so.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        frame(self, MAX_ANSWER).unwrap_or_else(|e| {
            let failed = Self::Failed(Failure::other(1, format!("the answer cannot be sent: {e}")));
            frame(&failed, MAX_ANSWER).unwrap_or_default()
        })
    }

    /// From the body of a frame. What it says reaches terminals: control characters in it are replaced.
    ///
    /// # Errors
    ///
    /// It is no answer.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let no = |e: serde_json::Error| WireError::Body(e.to_string());
        let mut value: Value = serde_json::from_slice(body).map_err(no)?;
        disarm(&mut value);
        let mut answer: Self = serde_json::from_value(value).map_err(no)?;
        if let Self::Failed(failure) = &mut answer {
            // 0 is what only an answer that it is done may end with.
            failure.exit = if (1..=6).contains(&failure.exit) { failure.exit } else { 1 };
        }
        Ok(answer)
    }

    /// With the process's number as its caller knows it: in a PID namespace of its own, the agent knows another.
    #[must_use]
    pub fn of_process(mut self, pid: i32) -> Self {
        match &mut self {
            Self::Info(info) => info.pid = pid,
            Self::Check(report) => report.pid = pid,
            Self::Reports(reports) => reports.iter_mut().for_each(|r| r.pid = pid),
            Self::Status(status) => status.pid = pid,
            Self::Failed(failure) => {
                if let Some(said) = failure.json.get_mut("pid") {
                    *said = pid.into();
                }
            }
            Self::Done | Self::Outside { .. } => {}
        }
        self
    }
}

/// Replaces control characters in every string.
fn disarm(value: &mut Value) {
    let harmful = |c: char| c.is_control() && c != '\n' && c != '\t';
    match value {
        Value::String(text) if text.contains(harmful) => *text = text.replace(harmful, "\u{fffd}"),
        Value::Array(list) => list.iter_mut().for_each(disarm),
        Value::Object(map) => map.values_mut().for_each(disarm),
        _ => {}
    }
}

fn frame<T: Serialize>(body: &T, max_bytes: usize) -> Result<Vec<u8>, WireError> {
    let mut out = vec![0; HEADER_BYTES];
    serde_json::to_writer(&mut out, body).map_err(|e| WireError::Body(e.to_string()))?;
    let len_bytes = out.len() - HEADER_BYTES;
    let Some(len) = u32::try_from(len_bytes).ok().filter(|_| len_bytes <= max_bytes) else {
        return Err(WireError::TooLong { len_bytes, max_bytes });
    };
    out[..4].copy_from_slice(MAGIC);
    out[4..6].copy_from_slice(&VERSION.to_le_bytes());
    out[8..].first_chunk_mut::<4>().into_iter().for_each(|place| *place = len.to_le_bytes());
    Ok(out)
}

/// A frame that comes in piece by piece; never holds more than one whole frame.
#[derive(Debug)]
pub struct Inbox {
    bytes: Vec<u8>,
    max_bytes: usize,
}

impl Inbox {
    /// For a body of at most `max_bytes`.
    #[must_use]
    pub fn new(max_bytes: usize) -> Self {
        Self { bytes: Vec::new(), max_bytes }
    }

    /// Whether nothing has come yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Takes the next bytes; the body, once it is all there.
    ///
    /// # Errors
    ///
    /// It is no frame, one of another version, or one that is too long: known as soon as its first bytes are.
    pub fn push(&mut self, piece: &[u8]) -> Result<Option<Vec<u8>>, WireError> {
        let (head, rest) = piece.split_at(HEADER_BYTES.saturating_sub(self.bytes.len()).min(piece.len()));
        self.bytes.extend_from_slice(head);
        let begun = self.bytes.len().min(MAGIC.len());
        if self.bytes[..begun] != MAGIC[..begun] {
            return Err(WireError::Magic);
        }
        let Some(&[_, _, _, _, v0, v1, z0, z1, l0, l1, l2, l3]) = self.bytes.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let theirs = u16::from_le_bytes([v0, v1]);
        if theirs != VERSION {
            return Err(WireError::Version { theirs });
        }
        if [z0, z1] != [0, 0] {
            return Err(WireError::Magic);
        }
        let len_bytes = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if len_bytes > self.max_bytes {
            return Err(WireError::TooLong { len_bytes, max_bytes: self.max_bytes });
        }
        let missing = (HEADER_BYTES + len_bytes).saturating_sub(self.bytes.len());
        if rest.len() > missing {
            return Err(WireError::Trailing);
        }
        self.bytes.extend_from_slice(rest);
        Ok((rest.len() == missing).then(|| self.bytes.split_off(HEADER_BYTES)))
    }
}
