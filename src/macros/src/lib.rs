//! The attribute `#[livepatch::hook]`: makes an ordinary Rust function a hook of a patch.
//!
//! What it writes uses the standard library only, so that a program with hooks need not link anything of livepatch.

use proc_macro2::{Span, TokenStream};
use quote::quote;
use syn::parse::{Parse, ParseStream};
use syn::{Error, Ident, ItemFn, ReturnType, Token};

/// When hooks run, and the names under which they are exported.
const KINDS: [(&str, &str); 4] = [
    ("pre_apply", "livepatch_pre_apply"),
    ("post_apply", "livepatch_post_apply"),
    ("pre_revert", "livepatch_pre_revert"),
    ("post_revert", "livepatch_post_revert"),
];

/// Makes a function a hook of the patch that leads to the build in which it is: `pre_apply`, `post_apply`, `pre_revert` or `post_revert`.
///
/// The function takes nothing, and returns nothing or a `Result<(), E>` whose error can be shown. An error is what the operator reads. So is
/// the message of a panic: it ends in the hook, unless the program is built to abort at panics.
///
/// ```
/// # static LIMIT: std::sync::atomic::AtomicI64 = std::sync::atomic::AtomicI64::new(7);
/// #[livepatch::hook(pre_apply)]
/// fn limits_are_loaded() -> Result<(), String> {
///     match LIMIT.load(std::sync::atomic::Ordering::Relaxed) {
///         0 => Err("no limits are loaded".into()),
///         _ => Ok(()),
///     }
/// }
/// # fn main() {}
/// ```
///
/// `#[livepatch::hook(post_apply, agent)]` asks for an agent in the process: all hooks of the patch run from inside then, or it is refused.
///
/// Anything else is an error of the compiler:
///
/// ```compile_fail
/// #[livepatch::hook(pre_aply)]
/// fn misspelled() {}
/// ```
///
/// ```compile_fail
/// #[livepatch::hook(pre_apply)]
/// fn asks(why: &str) {}
/// ```
///
/// ```compile_fail
/// #[livepatch::hook(pre_apply)]
/// async fn later() {}
/// ```
///
/// The crate may not `forbid(unsafe_code)`: an exported name and a text in memory of the caller are such code.
#[proc_macro_attribute]
pub fn hook(kind: proc_macro::TokenStream, function: proc_macro::TokenStream) -> proc_macro::TokenStream {
    let kind = syn::parse::<Kind>(kind);
    let expanded = kind.and_then(|kind| expand(&kind, &syn::parse(function)?));
    expanded.unwrap_or_else(Error::into_compile_error).into()
}

/// What stands behind `hook`.
struct Kind {
    symbol: Ident,
    agent: bool,
}

impl Parse for Kind {
    fn parse(input: ParseStream<'_>) -> syn::Result<Self> {
        let names = || KINDS.map(|(name, _)| name).join(", ");
        if input.is_empty() {
            return Err(Error::new(Span::call_site(), format!("say when it runs: one of {}", names())));
        }
        let kind: Ident = input.parse()?;
        let known = KINDS.into_iter().find(|(name, _)| kind == name);
        let Some((_, symbol)) = known else {
            return Err(Error::new(kind.span(), format!("a hook is one of {}", names())));
        };
        let mut agent = false;
        if !input.is_empty() {
            input.parse::<Token![,]>()?;
            let word: Ident = input.parse()?;
            agent = word == "agent";
            if !agent {
                return Err(Error::new(word.span(), "only `agent` can stand here"));
            }
        }
        Ok(Self { symbol: Ident::new(symbol, kind.span()), agent })
    }
}

fn expand(kind: &Kind, function: &ItemFn) -> syn::Result<TokenStream> {
    let signature = &function.sig;
    let no = |what: &str| Err(Error::new_spanned(signature, format!("a hook {what}")));
    if !signature.inputs.is_empty() {
        return no("takes no arguments");
    }
    if signature.asyncness.is_some() {
        return no("is called by a thread that waits for nothing: it cannot be async");
    }
    if signature.unsafety.is_some() || signature.abi.is_some() {
        return no("is an ordinary function of Rust, safe and without an ABI");
    }
    if !signature.generics.params.is_empty() {
        return no("is one function: it cannot be generic");
    }
    let (name, symbol) = (&signature.ident, &kind.symbol);
    let call = match signature.output {
        ReturnType::Default => quote! { { #name(); ::core::result::Result::Ok(()) } },
        ReturnType::Type(..) => {
            quote! { #name().map_err(|error| ::std::string::ToString::to_string(&error)) }
        }
    };
    let mark = kind.agent.then(|| {
        quote! {
            #[unsafe(no_mangle)]
            #[used]
            static livepatch_hooks_need_agent: u8 = 1;
        }
    });
    Ok(quote! {
        #function

        #[allow(unsafe_code, non_upper_case_globals)]
        const _: () = {
            #mark

            // Nothing of the program calls it.
            #[used]
            static KEPT: extern "C" fn(*mut u8, usize) -> i32 = #symbol;

            #[unsafe(no_mangle)]
            extern "C" fn #symbol(why: *mut u8, room: usize) -> i32 {
                let done = ::std::panic::catch_unwind(|| -> ::core::result::Result<(), ::std::string::String> { #call });
                let (result, text) = match done {
                    ::core::result::Result::Ok(::core::result::Result::Ok(())) => return 0,
                    ::core::result::Result::Ok(::core::result::Result::Err(error)) => (1, error),
                    ::core::result::Result::Err(panic) => {
                        let what = panic.downcast_ref::<&str>().copied();
                        let what = what.or_else(|| panic.downcast_ref::<::std::string::String>().map(|s| s.as_str()));
                        let text = ::std::format!("it panicked: {}", what.unwrap_or("with something that is no text"));
                        // To drop it may panic again.
                        ::core::mem::forget(panic);
                        (2, text)
                    }
                };
                let mut len = text.len().min(room.saturating_sub(1));
                while !text.is_char_boundary(len) {
                    len -= 1;
                }
                if room > 0 && !why.is_null() {
                    // SAFETY: whoever calls a hook gives so much room for a text (docs/patch-format.md), and the zero byte fits, too.
                    unsafe {
                        ::core::ptr::copy_nonoverlapping(text.as_ptr(), why, len);
                        why.add(len).write(0);
                    }
                }
                result
            }
        };
    })
}
