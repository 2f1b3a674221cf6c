//! Memory is given though signals come in between.
#![expect(unsafe_code, reason = "signals are sent to one thread, and ignored by a handler")]
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use kvm::GuestMemfdFlags;
use kvm::VmBuilder;
use kvm::guest_memfd;
use kvm::kvm_ioctls::Kvm;
use rustix::fs::FallocateFlags;
use tideover_region::Errno;
use tideover_region::PageSize;
use tideover_region::Region;
use tideover_region::Store;

const BYTES: u64 = 256 << 20;

static CAME: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count(_: libc::c_int) {
    CAME.fetch_add(1, Ordering::Relaxed);
}

/// Runs `work` in a thread that gets a signal every quarter of a millisecond.
fn under_signals<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    // SAFETY: the structure is plain data, for which zeros are the defaults; without SA_RESTART, calls end.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = count as *const () as usize;
    // SAFETY: the handler does nothing but add to an atomic.
    assert_eq!(unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) }, 0);
    let worker = thread::spawn(work);
    while !worker.is_finished() {
        // SAFETY: the thread has not been joined, so its handle is good.
        unsafe { libc::pthread_kill(worker.as_pthread_t(), libc::SIGUSR1) };
        thread::sleep(Duration::from_micros(250));
    }
    worker.join().unwrap()
}

fn guest_memfd() -> Region {
    let builder = VmBuilder::create(&Kvm::new().unwrap()).unwrap();
    let flags = GuestMemfdFlags::MMAP | GuestMemfdFlags::INIT_SHARED;
    let fd = guest_memfd::create(builder.fd(), BYTES, flags).unwrap();
    Region::accept_as("interrupted", fd, BYTES, Store::GuestMemfd, PageSize::Small).unwrap()
}

/// G5.3.7.
#[test]
fn an_allocation_goes_on_where_a_signal_ends_the_kernels() {
    harness::need!(kvm, guest_memfd);
    // The kernel's own, so that it is known that signals end it.
    let region = guest_memfd();
    let kernels = under_signals(move || {
        let from_nothing = |_| {
            region.punch(0, BYTES).unwrap();
            rustix::fs::fallocate(&region, FallocateFlags::KEEP_SIZE, 0, BYTES)
        };
        (0..300).map(from_nothing).find(|result| *result != Ok(()))
    });
    assert_eq!(kernels, Some(Err(Errno::INTR)));

    let region = guest_memfd();
    let before = CAME.load(Ordering::Relaxed);
    let region = under_signals(move || region.fill().map(|()| region)).unwrap();
    assert!(CAME.load(Ordering::Relaxed) > before, "none came");
    assert!(region.is_whole().unwrap());

    let region = Region::create("interrupted", BYTES).unwrap();
    let region = under_signals(move || region.allocate(4096, BYTES - 8192).map(|()| region)).unwrap();
    assert_eq!(region.allocated_bytes().unwrap(), Some(BYTES - 8192), "what was asked for, and no more");
}
