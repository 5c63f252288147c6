//! Shadow variables: a new field of an object that exists already, kept beside it, so that the object's layout stays as it is.
//!
//! A fix that needs one more field for each live session can't add it to `Session`: the sessions that are alive have no room for it. It attaches a
//! shadow instead, under the object's address and a number of its own:
//!
//! ```
//! use livepatch::shadow::Shadow;
//! use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
//!
//! static REJECTED: Shadow<AtomicU64> = Shadow::new(0x5e55_0001);
//!
//! struct Session;
//! # let session = Session;
//! REJECTED.with_or_attach(&session, || AtomicU64::new(0), |n| n.fetch_add(1, Relaxed));
//! assert_eq!(REJECTED.with(&session, |n| n.load(Relaxed)), Some(1));
//! // Where sessions end:
//! livepatch::shadow::drop_all_of(&session);
//! assert_eq!(REJECTED.with(&session, |n| n.load(Relaxed)), None);
//! ```
//!
//! They belong to the program, not to a patch: a later patch finds them under the same number, and so does the program after a revert. Reads
//! take no lock. What is attached to an object has to be dropped with it, or the next object at its address finds it: [`report`] tells what is
//! still there. C programs have `livepatch_shadow_*` (`include/livepatch.h`), made after the kernel's `klp_shadow_*`.
//!
//! Contract of the `unsafe` in this module: what the functions of C are given is their callers', and memory that they hand out is allocated
//! with the layout that it is freed with; beside them only `Reading` has any.
#![allow(unsafe_code)]

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::any::Any;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::sync::OnceLock;

use papaya::{HashMap, LocalGuard};
use parking_lot::{Mutex, MutexGuard};

/// The object's address, and the number of the shadow.
type Key = (usize, u64);

/// Locks of constructors: one for many keys.
const LOCKS: usize = 64;

struct Entry {
    value: Box<dyn Any + Send + Sync>,
    type_name: &'static str,
    len_bytes: usize,
}

struct All {
    entries: HashMap<Key, Entry>,
    /// Every number that was ever attached under: few.
    ids: HashMap<u64, ()>,
    locks: [Mutex<()>; LOCKS],
}

fn all() -> &'static All {
    static ALL: OnceLock<All> = OnceLock::new();
    ALL.get_or_init(|| All { entries: HashMap::new(), ids: HashMap::new(), locks: [const { Mutex::new(()) }; LOCKS] })
}

impl All {
    /// Known before it is attached under: whoever asks for the numbers of an object misses none.
    fn know(&self, id: u64) {
        let ids = self.ids.pin();
        if !ids.contains_key(&id) {
            ids.insert(id, ());
        }
    }

    fn lock(&self, key: Key) -> &Mutex<()> {
        let mixed = (key.0 >> 4).wrapping_mul(31).wrapping_add(key.1 as usize) % LOCKS;
        // The remainder is always one of them.
        self.locks.get(mixed).unwrap_or(&self.locks[0])
    }
}

fn address<O: ?Sized>(object: *const O) -> usize {
    object.cast::<()>() as usize
}

/// A field of type `T` beside objects of any type. Two shadows of one number are the same shadow, in whatever patch they are.
#[derive(Debug)]
pub struct Shadow<T> {
    id: u64,
    _type: PhantomData<fn() -> T>,
}

impl<T: Send + Sync + 'static> Shadow<T> {
    /// The shadow of this number: any that no other field of the program has.
    #[must_use]
    pub const fn new(id: u64) -> Self {
        Self { id, _type: PhantomData }
    }

    /// Calls `f` with what is attached to `object`; `None` if nothing is, or something of another type. Takes no lock.
    pub fn with<O: ?Sized, R>(&self, object: *const O, f: impl FnOnce(&T) -> R) -> Option<R> {
        let reading = Reading::begin();
        reading.find((address(object), self.id))?.value.downcast_ref().map(f)
    }

    /// Attaches `value` to `object`.
    ///
    /// # Errors
    ///
    /// Something is attached already: the value comes back.
    pub fn attach<O: ?Sized>(&self, object: *const O, value: T) -> Result<(), T> {
        let key = (address(object), self.id);
        let _one = lock(key);
        if Reading::begin().find(key).is_some() {
            return Err(value);
        }
        insert(key, Self::entry(value));
        Ok(())
    }

    /// Calls `f` with what is attached to `object`, and attaches what `make` makes first if nothing is. `make` runs once, under a lock.
    ///
    /// # Panics
    ///
    /// Something of another type is attached: two fields have one number.
    pub fn with_or_attach<O: ?Sized, R>(
        &self,
        object: *const O,
        make: impl FnOnce() -> T,
        f: impl FnOnce(&T) -> R,
    ) -> R {
        let key = (address(object), self.id);
        let reading = Reading::begin();
        let mut found = reading.find(key);
        if found.is_none() {
            // Who detaches it needs the lock; what was found stays as long as it is read.
            let _one = lock(key);
            found = reading.find(key);
            if found.is_none() {
                insert(key, Self::entry(make()));
                found = reading.find(key);
            }
        }
        match found.and_then(|entry| entry.value.downcast_ref()) {
            Some(value) => f(value),
            None => of_another_type(self.id, found, std::any::type_name::<T>()),
        }
    }

    /// Drops what is attached to `object`, once nobody reads it any more; whether something was.
    pub fn detach<O: ?Sized>(&self, object: *const O) -> bool {
        remove((address(object), self.id))
    }

    /// Drops what is attached to any object; how many were.
    pub fn detach_all(&self) -> usize {
        remove_all(self.id)
    }

    fn entry(value: T) -> Entry {
        Entry { value: Box::new(value), type_name: std::any::type_name::<T>(), len_bytes: size_of::<T>() }
    }
}

// What follows is the same for all types, and in every program that has an agent ([`keep`]): a patch calls it there, and brings no store of its own.

/// As long as it lives, nothing that was found goes away.
struct Reading(ManuallyDrop<LocalGuard<'static>>);

impl Reading {
    #[inline(never)]
    fn begin() -> Self {
        Self(ManuallyDrop::new(all().entries.guard()))
    }

    #[inline(never)]
    fn find(&self, key: Key) -> Option<&Entry> {
        all().entries.get(&key, &*self.0)
    }
}

impl Drop for Reading {
    /// Not even as a jump in the caller's crate: a patch would bring that one along.
    #[inline(never)]
    fn drop(&mut self) {
        // SAFETY: it is called once, and nothing uses the guard after that.
        unsafe { ManuallyDrop::drop(&mut self.0) };
    }
}

/// The lock of a key's constructor.
#[inline(never)]
fn lock(key: Key) -> MutexGuard<'static, ()> {
    all().lock(key).lock()
}

/// Under the lock.
#[inline(never)]
fn insert(key: Key, entry: Entry) {
    let all = all();
    all.know(key.1);
    all.entries.pin().insert(key, entry);
}

#[inline(never)]
#[cold]
fn of_another_type(id: u64, found: Option<&Entry>, wanted: &str) -> ! {
    panic!("shadow {id:#x} holds a {}, not a {wanted}", found.map_or("nothing", |entry| entry.type_name))
}

#[inline(never)]
fn remove(key: Key) -> bool {
    let all = all();
    let _one = all.lock(key).lock();
    all.entries.pin().remove(&key).is_some()
}

#[inline(never)]
fn remove_all(id: u64) -> usize {
    let keys: Vec<Key> = all().entries.pin().keys().filter(|k| k.1 == id).copied().collect();
    keys.into_iter().filter(|key| remove(*key)).count()
}

/// Drops every shadow of an object: to be called where it is freed, or the next object at its address has them. How many there were. One look
/// for each number in use, however many objects there are.
pub fn drop_all_of<O: ?Sized>(object: *const O) -> usize {
    remove_all_of(address(object))
}

#[inline(never)]
fn remove_all_of(address: usize) -> usize {
    let (entries, ids) = (all().entries.pin(), all().ids.pin());
    ids.keys().map(|id| (address, *id)).filter(|key| entries.contains_key(key) && remove(*key)).count()
}

/// What is attached under one number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The number.
    pub id: u64,
    /// To how many objects.
    pub objects: usize,
    /// Bytes of the values, without what they point to.
    pub bytes: usize,
    /// The type.
    pub type_name: &'static str,
}

/// All that is attached, by number: what grows without end is a leak.
#[must_use]
pub fn report() -> Vec<Attached> {
    let mut out: BTreeMap<u64, Attached> = BTreeMap::new();
    for ((_, id), entry) in &all().entries.pin() {
        let new = || Attached { id: *id, objects: 0, bytes: 0, type_name: entry.type_name };
        let sum = out.entry(*id).or_insert_with(new);
        sum.objects += 1;
        sum.bytes += entry.len_bytes;
    }
    out.into_values().collect()
}

/// Memory of a C program.
struct Blob {
    at: *mut u8,
    layout: Layout,
}

// SAFETY: what the bytes mean, and who may touch them when, is the C program's affair, as with any memory of its.
unsafe impl Send for Blob {}
// SAFETY: the same.
unsafe impl Sync for Blob {}

impl Drop for Blob {
    fn drop(&mut self) {
        // SAFETY: it was allocated so, and nobody else frees it.
        unsafe { dealloc(self.at, self.layout) };
    }
}

/// Fills new memory; anything but 0 says that it could not.
pub type Constructor = Option<unsafe extern "C" fn(object: *mut c_void, data: *mut c_void, with: *mut c_void) -> i32>;

/// Undoes what is in memory that is about to be freed.
pub type Destructor = Option<unsafe extern "C" fn(object: *mut c_void, data: *mut c_void)>;

/// The memory attached to `object` under `id`, or null. Takes no lock.
#[no_mangle]
pub extern "C" fn livepatch_shadow_get(object: *mut c_void, id: u64) -> *mut c_void {
    let at = |blob: &Blob| blob.at.cast();
    Shadow::<Blob>::new(id).with(object, at).unwrap_or(std::ptr::null_mut())
}

/// Attaches `len` zeroed bytes to `object`, which `constructor` then fills, and gives them; what is there already, if something is and
/// `or_get` says so; else null.
///
/// # Safety
///
/// `constructor` can be called with these three.
unsafe fn attach(
    object: *mut c_void,
    id: u64,
    len: usize,
    constructor: Constructor,
    with: *mut c_void,
    or_get: bool,
) -> *mut c_void {
    let null = std::ptr::null_mut();
    let (all, key) = (all(), (object as usize, id));
    let _one = all.lock(key).lock();
    let entries = all.entries.pin();
    if let Some(entry) = entries.get(&key) {
        return entry.value.downcast_ref().filter(|_| or_get).map_or(null, |b: &Blob| b.at.cast());
    }
    let Ok(layout) = Layout::from_size_align(len.max(1), 16) else { return null };
    // SAFETY: the layout has a size.
    let at = unsafe { alloc_zeroed(layout) };
    if at.is_null() {
        return null;
    }
    let blob = Blob { at, layout };
    if let Some(constructor) = constructor {
        // SAFETY: the caller's.
        if unsafe { constructor(object, at.cast(), with) } != 0 {
            return null;
        }
    }
    all.know(id);
    entries.insert(key, Entry { value: Box::new(blob), type_name: "memory of C", len_bytes: len });
    at.cast()
}

/// Attaches `len` zeroed bytes to `object` under `id` and has `constructor` fill them, under a lock. Null where something is attached
/// already, where there is no memory, or where the constructor gives anything but 0.
///
/// # Safety
///
/// `constructor`, if not null, can be called with `object`, the bytes and `with`; it uses no shadow itself.
#[no_mangle]
pub unsafe extern "C" fn livepatch_shadow_attach(
    object: *mut c_void,
    id: u64,
    len: usize,
    constructor: Constructor,
    with: *mut c_void,
) -> *mut c_void {
    // SAFETY: the caller's.
    unsafe { attach(object, id, len, constructor, with, false) }
}

/// The same, but gives what is attached already.
///
/// # Safety
///
/// As of [`livepatch_shadow_attach`].
#[no_mangle]
pub unsafe extern "C" fn livepatch_shadow_get_or_attach(
    object: *mut c_void,
    id: u64,
    len: usize,
    constructor: Constructor,
    with: *mut c_void,
) -> *mut c_void {
    // SAFETY: the caller's.
    unsafe { attach(object, id, len, constructor, with, true) }
}

/// Detaches what `object` has under `id`; `destructor` first.
///
/// # Safety
///
/// `destructor`, if not null, can be called with `object` and the bytes; nobody uses the bytes any more.
#[no_mangle]
pub unsafe extern "C" fn livepatch_shadow_detach(object: *mut c_void, id: u64, destructor: Destructor) {
    let (all, key) = (all(), (object as usize, id));
    let _one = all.lock(key).lock();
    let entries = all.entries.pin();
    if let (Some(destructor), Some(blob)) = (destructor, entries.get(&key).and_then(|e| e.value.downcast_ref::<Blob>()))
    {
        // SAFETY: the caller's.
        unsafe { destructor(object, blob.at.cast()) };
    }
    entries.remove(&key);
}

/// Detaches what any object has under `id`.
///
/// # Safety
///
/// As of [`livepatch_shadow_detach`], for every object.
#[no_mangle]
pub unsafe extern "C" fn livepatch_shadow_detach_all(id: u64, destructor: Destructor) {
    let keys: Vec<Key> = all().entries.pin().keys().filter(|k| k.1 == id).copied().collect();
    for (object, id) in keys {
        // SAFETY: the caller's.
        unsafe { livepatch_shadow_detach(object as *mut c_void, id, destructor) };
    }
}

/// How many objects have something under `id`, and how many bytes that is.
///
/// # Safety
///
/// Both point to numbers that can be written.
#[no_mangle]
pub unsafe extern "C" fn livepatch_shadow_count(id: u64, objects: *mut usize, bytes: *mut usize) {
    let found = report().into_iter().find(|a| a.id == id);
    // SAFETY: the caller's.
    unsafe {
        objects.write(found.as_ref().map_or(0, |f| f.objects));
        bytes.write(found.as_ref().map_or(0, |f| f.bytes));
    }
}

/// Detaches everything that `object` has: to be called where it is freed. No destructor is called.
#[no_mangle]
pub extern "C" fn livepatch_shadow_drop_all_of(object: *mut c_void) {
    drop_all_of(object);
}

/// Sees to it that a program has all of this for its patches before anything in it calls it.
pub(crate) fn keep() {
    use std::hint::black_box;
    black_box((Reading::begin as fn() -> _, std::ptr::drop_in_place::<Reading> as unsafe fn(_)));
    black_box(Reading::find as for<'r> fn(&'r Reading, Key) -> Option<&'r Entry>);
    black_box((lock as fn(_) -> _, insert as fn(_, _), of_another_type as fn(u64, Option<&Entry>, &str) -> !));
    black_box((remove as fn(_) -> _, remove_all as fn(_) -> _, remove_all_of as fn(_) -> _));
    black_box((livepatch_shadow_get as *const c_void, livepatch_shadow_attach as *const c_void));
    black_box((livepatch_shadow_get_or_attach as *const c_void, livepatch_shadow_detach as *const c_void));
    black_box((livepatch_shadow_detach_all as *const c_void, livepatch_shadow_count as *const c_void));
    black_box(livepatch_shadow_drop_all_of as *const c_void);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::sync::Arc;

    #[test]
    fn an_object_has_its_shadow_until_it_is_dropped() {
        static NAME: Shadow<String> = Shadow::new(1);
        let object = [0u8; 4];
        assert_eq!(NAME.with(&object, String::len), None);
        NAME.attach(&object, "abc".into()).unwrap();
        assert_eq!(NAME.attach(&object, "d".into()), Err("d".into()));
        assert_eq!(NAME.with(&object, String::len), Some(3));
        assert_eq!(Shadow::<u32>::new(1).with(&object, |n| *n), None, "another type");
        assert!(NAME.detach(&object) && !NAME.detach(&object));
    }

    #[test]
    fn the_next_object_at_an_address_has_none() {
        static COUNT: Shadow<u64> = Shadow::new(2);
        let place = Box::into_raw(Box::new(5u64));
        COUNT.attach(place, 7).unwrap();
        assert_eq!(drop_all_of(place), 1);
        // The same address again, for another object.
        assert_eq!(COUNT.with_or_attach(place, || 0, |n| *n), 0);
        COUNT.detach(place);
        // SAFETY: it came from a box.
        drop(unsafe { Box::from_raw(place) });
    }

    #[test]
    fn one_of_many_makes_it() {
        static MADE: Shadow<AtomicUsize> = Shadow::new(3);
        static CALLS: AtomicUsize = AtomicUsize::new(0);
        let objects: Vec<u64> = (0..50).collect();
        std::thread::scope(|s| {
            for _ in 0..8 {
                s.spawn(|| {
                    for o in &objects {
                        let make = || {
                            CALLS.fetch_add(1, SeqCst);
                            AtomicUsize::new(0)
                        };
                        MADE.with_or_attach(o, make, |n| n.fetch_add(1, SeqCst));
                    }
                });
            }
        });
        assert_eq!(CALLS.load(SeqCst), 50);
        assert!(objects.iter().all(|o| MADE.with(o, |n| n.load(SeqCst)) == Some(8)));
        let told = report().into_iter().find(|a| a.id == 3).unwrap();
        assert_eq!((told.objects, told.bytes), (50, 50 * size_of::<AtomicUsize>()));
        assert_eq!(MADE.detach_all(), 50);
        assert!(report().iter().all(|a| a.id != 3));
    }

    #[test]
    fn what_is_read_lives_until_it_was_read() {
        static LIVES: Shadow<Arc<()>> = Shadow::new(4);
        let (object, value) = (0u8, Arc::new(()));
        LIVES.attach(&object, Arc::clone(&value)).unwrap();
        LIVES.with(&object, |v| {
            assert!(LIVES.detach(&object));
            assert_eq!(Arc::strong_count(v), 2);
        });
    }

    #[test]
    fn c_has_memory_with_constructor_and_destructor() {
        unsafe extern "C" fn make(_object: *mut c_void, data: *mut c_void, with: *mut c_void) -> i32 {
            // SAFETY: eight bytes, of the test.
            unsafe { *data.cast::<u64>() = with as u64 };
            i32::from(with.is_null())
        }
        static ENDED: AtomicUsize = AtomicUsize::new(0);
        unsafe extern "C" fn end(_object: *mut c_void, data: *mut c_void) {
            // SAFETY: eight bytes, of the test.
            ENDED.fetch_add(unsafe { *data.cast::<u64>() } as usize, SeqCst);
        }
        let object = std::ptr::from_ref(&ENDED).cast_mut().cast();
        // SAFETY: the functions above, with what they take.
        unsafe {
            assert!(livepatch_shadow_attach(object, 5, 8, Some(make), std::ptr::null_mut()).is_null());
            let at = livepatch_shadow_attach(object, 5, 8, Some(make), 9 as *mut c_void);
            assert_eq!(*at.cast::<u64>(), 9);
            assert!(livepatch_shadow_attach(object, 5, 8, None, std::ptr::null_mut()).is_null());
            assert_eq!(livepatch_shadow_get_or_attach(object, 5, 8, None, std::ptr::null_mut()), at);
            assert_eq!(livepatch_shadow_get(object, 5), at);
            livepatch_shadow_detach_all(5, Some(end));
        }
        assert_eq!(ENDED.load(SeqCst), 9);
        assert!(livepatch_shadow_get(object, 5).is_null());
    }
}
