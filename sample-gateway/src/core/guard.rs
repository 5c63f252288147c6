//! The boundary around the business layer: a panic in it costs one request.

use std::panic::{catch_unwind, AssertUnwindSafe};

/// A business function panicked; the text is the panic's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Panicked(pub String);

/// Calls a business function.
///
/// Unwind safety: the business layer keeps nothing and is lent `Context` immutably; a body that it was writing is thrown
/// away by the caller, so no half-done state is seen afterwards.
///
/// # Errors
/// [`Panicked`] when the function panicked instead of returning.
pub fn guarded<R>(call: impl FnOnce() -> R) -> Result<R, Panicked> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|payload| {
        let text = payload
            .downcast_ref::<&str>()
            .map(ToString::to_string)
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "panic without a message".to_owned());
        // The text goes into a FIX field: no delimiter, no line break.
        Panicked(text.chars().filter(|c| c.is_ascii() && !c.is_ascii_control()).take(200).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_value() {
        assert_eq!(guarded(|| 5), Ok(5));
        let n = std::hint::black_box(7);
        assert_eq!(guarded(|| assert!(n != 7, "seven is {n}")), Err(Panicked("seven is 7".to_owned())));
    }
}
