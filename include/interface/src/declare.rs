//! The macros.

/// Says how a type is laid out, so that it may cross an interface. It stands beside the type's definition.
///
/// ```
/// #[repr(C)]
/// struct Order { qty: i64, price: Price }
/// struct Price(i64);
/// enum Side { Buy, Sell }
/// livepatch_interface::describe! { struct Order { qty: i64, price: Price } }
/// livepatch_interface::describe! { struct Price { 0: i64 } }
/// livepatch_interface::describe! { enum Side { Buy, Sell } }
/// ```
///
/// A field left out does not compile:
///
/// ```compile_fail
/// struct Order { qty: i64, price: i64 }
/// livepatch_interface::describe! { struct Order { qty: i64 } }
/// ```
#[macro_export]
macro_rules! describe {
    (struct $name:ident $([$($param:tt)*] [$($arg:tt)*])? { $($field:tt: $ty:ty),* $(,)? }) => {
        // SAFETY: offsets and sizes are the compiler's; that no field is missing and each has its type is checked below.
        #[allow(unsafe_code)]
        unsafe impl $(<$($param)*>)? $crate::Crosses for $name $(<$($arg)*>)? {
            const LAYOUT: &'static $crate::Layout = &$crate::Layout::of::<Self>(
                stringify!($name),
                $crate::Shape::Struct(&[$($crate::Field {
                    name: stringify!($field),
                    offset: ::std::mem::offset_of!(Self, $field),
                    layout: <$ty as $crate::Crosses>::LAYOUT,
                }),*]),
            );
            fn every_field_is_described(&self) {
                let $name { $($field: _),* } = self;
                $(let _: &$ty = &self.$field;)*
            }
        }
    };
    (enum $name:ident { $($variant:ident),* $(,)? }) => {
        // SAFETY: size and values are the compiler's; that no variant is missing is checked below.
        #[allow(unsafe_code)]
        unsafe impl $crate::Crosses for $name {
            const LAYOUT: &'static $crate::Layout = &$crate::Layout::of::<Self>(
                stringify!($name),
                $crate::Shape::Enum(&[$((stringify!($variant), $name::$variant as i64)),*]),
            );
            fn every_field_is_described(&self) {
                match self {
                    $($name::$variant => {})*
                }
            }
        }
    };
}

/// Declares an interface: a trait that a module implements and a program calls, and its table of functions.
///
/// ```
/// livepatch_interface::interface! {
///     /// What an order costs.
///     pub trait Pricing, table PricingTable, version "1.0";
///     /// In hundredths.
///     fn fee(&self, qty: i64, price: i64) -> i64;
/// }
/// ```
#[macro_export]
macro_rules! interface {
    (
        $(#[$about:meta])*
        pub trait $name:ident, table $table:ident, version $version:literal;
        $($(#[$doc:meta])* fn $function:ident(&self $(, $arg:ident: $ty:ty)* $(,)?) $(-> $ret:ty)?;)+
    ) => {
        $(#[$about])*
        pub trait $name {
            $($(#[$doc])* fn $function(&self $(, $arg: $ty)*) $(-> $ret)?;)+
        }

        /// The functions of the interface, in the order of their declaration.
        #[repr(C)]
        #[derive(Debug)]
        pub struct $table {
            $($function: unsafe extern "C" fn(
                *const ::std::ffi::c_void,
                $($ty,)*
                *mut ::std::mem::MaybeUninit<$crate::result!($($ret)?)>,
                *mut $crate::Message,
            ) -> bool,)+
        }

        // SAFETY: struct and list come from one declaration.
        #[allow(unsafe_code)]
        unsafe impl $crate::Table for $table {
            const NAME: &'static str = stringify!($name);
            const VERSION: &'static str = $version;
            const FUNCTIONS: &'static [$crate::Function] = &[$($crate::Function::new(
                stringify!($function),
                &[$((stringify!($arg), <$ty as $crate::Crosses>::LAYOUT)),*],
                <$crate::result!($($ret)?) as $crate::Crosses>::LAYOUT,
            )),+];
            fn text() -> String {
                const LEN: usize = $crate::describe::<0>(($table::NAME, $table::VERSION), $table::FUNCTIONS, &[], None).1;
                const TEXT: [u8; LEN] = $crate::describe::<LEN>(($table::NAME, $table::VERSION), $table::FUNCTIONS, &[], None).0;
                use $crate::Table;
                String::from_utf8_lossy(&TEXT).into_owned()
            }
        }

        #[allow(unsafe_code, improper_ctypes_definitions)]
        impl $table {
            /// The table for one implementation.
            #[must_use]
            pub const fn of<M: $name + Send + Sync>() -> Self {
                $(unsafe extern "C" fn $function<M: $name>(
                    this: *const ::std::ffi::c_void,
                    $($arg: $ty,)*
                    out: *mut ::std::mem::MaybeUninit<$crate::result!($($ret)?)>,
                    why: *mut $crate::Message,
                ) -> bool {
                    // SAFETY: the caller hands in an object of this table's type, and two places of its own to write to.
                    unsafe { $crate::returned(out, why, || (*this.cast::<M>()).$function($($arg),*)) }
                })+
                Self { $($function: $function::<M>),+ }
            }
        }

        #[allow(unsafe_code)]
        impl $name for $crate::Call<'_, $table> {
            $(fn $function(&self $(, $arg: $ty)*) $(-> $ret)? {
                let mut out = ::std::mem::MaybeUninit::uninit();
                let mut why = $crate::Message::default();
                // SAFETY: the object is this table's (`Call::new`). `out` is written when the function returns true.
                unsafe {
                    if (self.table().$function)(self.this(), $($arg,)* &mut out, &mut why) {
                        out.assume_init()
                    } else {
                        $crate::panicked(&why)
                    }
                }
            })+
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! result {
    () => {
        ()
    };
    ($ty:ty) => {
        $ty
    };
}

/// Makes a `cdylib` a module: `export!(Desk: PricingTable)`, with what it declares of itself behind it, as
/// `allow "static my_module::COUNTER"`. [`Module`](crate::Module) and the interface's trait are implemented for the type.
#[macro_export]
macro_rules! export {
    ($object:ty: $table:ident $(, allow $what:literal)* $(,)?) => {
        #[allow(unsafe_code)]
        const _: () = {
            use $crate::Table as _;
            const MORE: &[(&str, &str)] = &[$(("allow", $what)),*];
            const STATE: Option<u32> = Some(<$object as $crate::Module>::STATE);
            const LEN: usize = $crate::describe::<0>(($table::NAME, $table::VERSION), $table::FUNCTIONS, MORE, STATE).1;
            #[used]
            #[link_section = ".livepatch.module"]
            static TEXT: [u8; LEN] = $crate::describe::<LEN>(($table::NAME, $table::VERSION), $table::FUNCTIONS, MORE, STATE).0;
            static TABLE: $table = $table::of::<$object>();

            #[no_mangle]
            unsafe extern "C" fn livepatch_module_1(
                saved: *const u8,
                len: usize,
                version: u32,
                instance: *mut $crate::Instance,
                why: *mut $crate::Message,
            ) -> bool {
                // SAFETY: the program's contract, which is that of `create`.
                unsafe { $crate::create::<$object, $table>((&TABLE, &TEXT), (saved, len, version), instance, why) }
            }
        };
    };
}
