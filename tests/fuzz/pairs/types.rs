// rustc --edition 2021 -g -Cpanic=abort -Copt-level=1 --emit=obj -Ccodegen-units=1 --remap-path-prefix=$PWD=. -o types-rust.o types.rs
// clang -nostdlib -nostartfiles -Wl,--unresolved-symbols=ignore-all -Wl,--build-id -no-pie -o types-rust types-rust.o (never run; only its types are read)
#![no_std]
#![no_main]
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! { loop {} }
pub enum Order<'a> { Limit { price: u64, symbol: &'a str }, Market(Option<&'a Order<'a>>), Cancel }
pub trait Rule { fn check(&self, order: &Order<'_>) -> Result<u32, u8>; }
pub struct Cap(pub u64);
impl Rule for Cap { fn check(&self, order: &Order<'_>) -> Result<u32, u8> { match order { Order::Limit { price, .. } if *price > self.0 => Err(1), Order::Market(Some(o)) => self.check(o), _ => Ok(7) } } }
struct Twice(u8);
impl Future for Twice { type Output = u64; fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<u64> { self.0 += 1; if self.0 > 2 { Poll::Ready(5) } else { Poll::Pending } } }
async fn session(rule: &'static dyn Rule, price: u64) -> u64 { let a = Twice(0).await; let r = rule.check(&Order::Limit { price: a + price, symbol: "A" }); let b = Twice(1).await; b + r.map_or(0, u64::from) }
static CAP: Cap = Cap(10);
#[no_mangle]
pub extern "C" fn _start() -> ! { let mut f = session(&CAP, 3); let mut cx = Context::from_waker(core::task::Waker::noop()); let mut f = unsafe { Pin::new_unchecked(&mut f) }; loop { if let Poll::Ready(v) = f.as_mut().poll(&mut cx) { if v > 3 { loop {} } } } }
