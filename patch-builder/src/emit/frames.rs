//! The patch's `.eh_frame`: the new build's call-frame instructions under headers of our own.

use std::collections::HashMap;

use super::{OutKind, OutReloc, OutTarget};
use crate::build::{Fde, FuncId};
use crate::select::Bound;

const DW_EH_PE_PCREL_SDATA4: u8 = 0x1b;
const DW_EH_PE_INDIRECT: u8 = 0x80;

/// Where a function and its exception table ended up.
pub struct Placed {
    pub at: u64,
    pub lsda: Option<u64>,
}

/// What an entry is for.
#[derive(Clone, Copy, Debug)]
pub enum Covered {
    /// A function of the new build.
    Func(FuncId),
    /// Code of a hook object, by its index.
    Foreign(usize),
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct CieKey {
    initial: Vec<u8>,
    code_align: u64,
    data_align: i64,
    return_register: u16,
    signal: bool,
    personality: Option<(Bound, bool)>,
    lsda: bool,
}

struct Entry {
    cie: usize,
    id: Covered,
    len: u64,
    instructions: Vec<u8>,
    lsda: bool,
}

/// The table, first as a plan of known length, then as bytes.
pub struct Frames {
    at: u64,
    cies: Vec<CieKey>,
    known: HashMap<CieKey, usize>,
    entries: Vec<Entry>,
}

impl Frames {
    pub fn new(at: u64) -> Self {
        Self { at, cies: Vec::new(), known: HashMap::new(), entries: Vec::new() }
    }

    pub fn reserve(&mut self, id: Covered, fde: &Fde<'_>, personality: Option<(Bound, bool)>, lsda: bool) {
        let key = CieKey {
            initial: fde.initial.to_vec(),
            code_align: fde.code_align,
            data_align: fde.data_align,
            return_register: fde.return_register,
            signal: fde.signal,
            personality,
            lsda,
        };
        let cie = *self.known.entry(key.clone()).or_insert_with(|| {
            self.cies.push(key);
            self.cies.len() - 1
        });
        self.entries.push(Entry { cie, id, len: fde.len, instructions: fde.instructions.to_vec(), lsda });
    }

    pub fn len(&self) -> u64 {
        self.write(|_| Placed { at: 0, lsda: None }, |_| None).0.len() as u64
    }

    pub fn write(
        &self,
        placed: impl Fn(Covered) -> Placed,
        resolve: impl Fn(Bound) -> Option<OutTarget>,
    ) -> (Vec<u8>, Vec<OutReloc>) {
        let (mut out, mut relocs) = (Vec::new(), Vec::new());
        let mut cie_at = Vec::new();
        for cie in &self.cies {
            cie_at.push(out.len());
            self.cie(cie, &mut out, &mut relocs, &resolve);
        }
        for entry in &self.entries {
            let start = out.len();
            out.extend([0; 4]);
            let back = out.len() - cie_at[entry.cie];
            out.extend((back as u32).to_le_bytes());
            let to = placed(entry.id);
            let relative =
                |target: u64, out: &Vec<u8>| (target.wrapping_sub(self.at + out.len() as u64) as u32).to_le_bytes();
            let pc = relative(to.at, &out);
            out.extend(pc);
            out.extend((entry.len as u32).to_le_bytes());
            if entry.lsda {
                out.push(4);
                let lsda = relative(to.lsda.unwrap_or(0), &out);
                out.extend(lsda);
            } else {
                out.push(0);
            }
            out.extend(&entry.instructions);
            finish(start, &mut out);
        }
        out.extend([0; 4]);
        (out, relocs)
    }

    fn cie(
        &self,
        cie: &CieKey,
        out: &mut Vec<u8>,
        relocs: &mut Vec<OutReloc>,
        resolve: &dyn Fn(Bound) -> Option<OutTarget>,
    ) {
        let start = out.len();
        out.extend([0; 8]); // length, and 0: a CIE
        out.push(1);
        out.push(b'z');
        out.extend(cie.personality.map(|_| b'P'));
        out.extend(cie.lsda.then_some(b'L'));
        out.push(b'R');
        out.extend(cie.signal.then_some(b'S'));
        out.push(0);
        uleb(cie.code_align, out);
        sleb(cie.data_align, out);
        out.push(cie.return_register as u8);
        let len = 1 + if cie.personality.is_some() { 5 } else { 0 } + u8::from(cie.lsda);
        out.push(len);
        if let Some((to, indirect)) = cie.personality {
            out.push(DW_EH_PE_PCREL_SDATA4 | if indirect { DW_EH_PE_INDIRECT } else { 0 });
            let at = self.at + out.len() as u64;
            let value = match resolve(to) {
                Some(OutTarget::Patch(to)) => to.wrapping_sub(at) as u32,
                Some(to) => {
                    relocs.push(OutReloc { at, kind: OutKind::Pc32, to, addend: 0 });
                    0
                }
                None => 0,
            };
            out.extend(value.to_le_bytes());
        }
        if cie.lsda {
            out.push(DW_EH_PE_PCREL_SDATA4);
        }
        out.push(DW_EH_PE_PCREL_SDATA4);
        out.extend(&cie.initial);
        finish(start, out);
    }
}

/// Pads an entry with `DW_CFA_nop` and stores its length.
fn finish(start: usize, out: &mut Vec<u8>) {
    while !(out.len() - start).is_multiple_of(8) {
        out.push(0);
    }
    let len = (out.len() - start - 4) as u32;
    out[start..start + 4].copy_from_slice(&len.to_le_bytes());
}

fn uleb(mut value: u64, out: &mut Vec<u8>) {
    loop {
        let byte = (value & 0x7f) as u8;
        value >>= 7;
        if value == 0 {
            return out.push(byte);
        }
        out.push(byte | 0x80);
    }
}

fn sleb(mut value: i64, out: &mut Vec<u8>) {
    loop {
        let byte = (value & 0x7f) as u8;
        value >>= 7;
        if value == 0 && byte & 0x40 == 0 || value == -1 && byte & 0x40 != 0 {
            return out.push(byte);
        }
        out.push(byte | 0x80);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_data_alignment_of_x86_64_is_one_byte() {
        let mut out = Vec::new();
        super::sleb(-8, &mut out);
        super::uleb(1, &mut out);
        assert_eq!(out, [0x78, 0x01]);
    }
}
