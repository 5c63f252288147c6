//! The strict unwinder: full CFI, all sixteen registers, expressions, signal frames. It never guesses: what it
//! does not know is an error, and an unwind that does not reach the root proves nothing.

use gimli::{CfaRule, EvaluationResult, Location, Register, RegisterRule, UnwindContext, UnwindExpression, Value};

use super::cfi::{Cfi, Found};
use crate::addr::ProcAddr;
use crate::memory::ReadMemory;
use crate::process::{Registers, RSP};

/// Frames of one thread at most.
const MAX_FRAMES: usize = 10_000;

/// Memory reads of one DWARF expression at most.
const MAX_STEPS: usize = 1_000;

/// DWARF number of the return address (System V psABI for x86-64, figure 3.36).
const RETURN_ADDRESS: Register = Register(16);

/// Registers that a function leaves as they were: `rbx`, `rbp`, `r12` to `r15`.
const PRESERVED: [usize; 6] = [3, 6, 12, 13, 14, 15];

/// Why an unwind did not reach the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnwindError {
    /// Nothing describes the code at this address.
    #[error("no unwind table describes the code at {0}")]
    NoTable(ProcAddr),
    /// The description cannot be followed.
    #[error("the unwind table's rules for {0} cannot be followed")]
    Rules(ProcAddr),
    /// A register or word that a rule needs is not known.
    #[error("the rules for {0} need a value that is not known")]
    Unknown(ProcAddr),
    /// The stack does not end.
    #[error("the stack does not end")]
    Endless,
}

/// One frame, the innermost first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Where it stands.
    pub pc: ProcAddr,
    /// Whether it was interrupted at `pc`; otherwise a callee returns there.
    pub exact: bool,
}

/// Walks the frames of one thread.
pub struct Unwinder<'a> {
    cfi: &'a Cfi,
    memory: &'a dyn ReadMemory,
}

struct State {
    known: [Option<u64>; 16],
    frame: Frame,
}

impl<'a> Unwinder<'a> {
    /// With these tables, in this memory.
    #[must_use]
    pub fn new(cfi: &'a Cfi, memory: &'a dyn ReadMemory) -> Self {
        Self { cfi, memory }
    }

    /// As [`walk`](Self::walk), for a thread of which only the stack pointer and the program counter are known.
    ///
    /// # Errors
    ///
    /// The root was not reached.
    pub fn walk_blocked(&self, sp: ProcAddr, pc: ProcAddr, each: &mut dyn FnMut(Frame)) -> Result<(), UnwindError> {
        let mut known = [None; 16];
        known[RSP] = Some(sp.0);
        self.walk_on(State { known, frame: Frame { pc, exact: true } }, each)
    }

    /// Calls `each` for every frame up to the root.
    ///
    /// # Errors
    ///
    /// The root was not reached.
    pub fn walk(&self, registers: &Registers, each: &mut dyn FnMut(Frame)) -> Result<(), UnwindError> {
        let frame = Frame { pc: registers.pc, exact: true };
        self.walk_on(State { known: registers.general.map(Some), frame }, each)
    }

    fn walk_on(&self, mut state: State, each: &mut dyn FnMut(Frame)) -> Result<(), UnwindError> {
        let mut context = UnwindContext::new();
        for _ in 0..MAX_FRAMES {
            each(state.frame);
            match self.step(&state, &mut context)? {
                Some(next) => state = next,
                None => return Ok(()),
            }
        }
        Err(UnwindError::Endless)
    }

    /// The caller's frame, or `None` at the root: where the return address is declared undefined.
    fn step(&self, state: &State, context: &mut UnwindContext<usize>) -> Result<Option<State>, UnwindError> {
        let pc = state.frame.pc;
        let look_up = if state.frame.exact { Some(pc) } else { pc.checked_sub(1) };
        let look_up = look_up.ok_or(UnwindError::NoTable(pc))?;
        let found = self.cfi.find(look_up).ok_or(UnwindError::NoTable(pc))?;
        let row = found
            .fde
            .unwind_info_for_address(&found.section, &found.bases, context, look_up.0)
            .map_err(|_| UnwindError::Rules(pc))?;
        if found.fde.cie().return_address_register() != RETURN_ADDRESS {
            return Err(UnwindError::Rules(pc));
        }
        let unknown = || UnwindError::Unknown(pc);
        let cfa = match row.cfa() {
            CfaRule::RegisterAndOffset { register, offset } => {
                state.get(*register).ok_or_else(unknown)?.wrapping_add_signed(*offset)
            }
            CfaRule::Expression(e) => self.evaluate(&found, *e, state, None)?,
        };
        let mut next = [None; 16];
        for i in PRESERVED {
            next[i] = state.known[i];
        }
        next[RSP] = Some(cfa);
        let mut return_to = None;
        for (register, rule) in row.registers() {
            // A function that saves what no call preserves ends by a jump to a landing pad (`__builtin_eh_return`): the unwinder's own. It
            // overwrites what its caller's frame is found by, so that frames would be passed over.
            let of_unwinder = matches!(register.0, 0 | 1) && !found.fde.is_signal_trampoline();
            if of_unwinder && matches!(rule, RegisterRule::Offset(_)) {
                return Err(UnwindError::Rules(pc));
            }
            let value = match rule {
                RegisterRule::Undefined if *register == RETURN_ADDRESS => return Ok(None),
                RegisterRule::Undefined => None,
                RegisterRule::SameValue => state.get(*register),
                RegisterRule::Offset(o) => Some(self.load(cfa.wrapping_add_signed(*o), pc)?),
                RegisterRule::ValOffset(o) => Some(cfa.wrapping_add_signed(*o)),
                RegisterRule::Register(other) => state.get(*other),
                RegisterRule::Expression(e) => {
                    let at = self.evaluate(&found, *e, state, Some(cfa))?;
                    Some(self.load(at, pc)?)
                }
                RegisterRule::ValExpression(e) => Some(self.evaluate(&found, *e, state, Some(cfa))?),
                RegisterRule::Constant(c) => Some(*c),
                _ => return Err(UnwindError::Rules(pc)),
            };
            if *register == RETURN_ADDRESS {
                return_to = value;
            } else if let Some(slot) = next.get_mut(usize::from(register.0)) {
                *slot = value;
            }
        }
        let return_to = ProcAddr(return_to.ok_or_else(unknown)?);
        // What a signal interrupted stands exactly there; so does what it returns to in all its registers.
        let exact = found.fde.cie().is_signal_trampoline();
        if !exact && next[RSP] <= state.known[RSP] {
            return Err(UnwindError::Endless);
        }
        Ok(Some(State { known: next, frame: Frame { pc: return_to, exact } }))
    }

    fn load(&self, at: u64, pc: ProcAddr) -> Result<u64, UnwindError> {
        self.memory.read_u64(ProcAddr(at)).map_err(|_| UnwindError::Unknown(pc))
    }

    fn evaluate(
        &self,
        found: &Found<'_>,
        expression: UnwindExpression<usize>,
        state: &State,
        initial: Option<u64>,
    ) -> Result<u64, UnwindError> {
        let pc = state.frame.pc;
        let bad = |_| UnwindError::Rules(pc);
        let expression = expression.get(&found.section).map_err(bad)?;
        let mut evaluation = expression.evaluation(found.fde.cie().encoding());
        if let Some(value) = initial {
            evaluation.set_initial_value(value);
        }
        evaluation.set_max_iterations(10_000);
        let mut result = evaluation.evaluate().map_err(bad)?;
        for _ in 0..MAX_STEPS {
            result = match result {
                EvaluationResult::Complete => break,
                EvaluationResult::RequiresRegister { register, .. } => {
                    let value = state.get(register).ok_or(UnwindError::Unknown(pc))?;
                    evaluation.resume_with_register(Value::Generic(value)).map_err(bad)?
                }
                EvaluationResult::RequiresMemory { address, size: 8, space: None, .. } => {
                    let value = self.load(address, pc)?;
                    evaluation.resume_with_memory(Value::Generic(value)).map_err(bad)?
                }
                _ => return Err(UnwindError::Rules(pc)),
            };
        }
        if result != EvaluationResult::Complete {
            return Err(UnwindError::Rules(pc));
        }
        match evaluation.result().first().map(|p| p.location) {
            Some(Location::Address { address }) => Ok(address),
            _ => Err(UnwindError::Rules(pc)),
        }
    }
}

impl State {
    fn get(&self, register: Register) -> Option<u64> {
        if register == RETURN_ADDRESS {
            return Some(self.frame.pc.0);
        }
        *self.known.get(usize::from(register.0))?
    }
}
