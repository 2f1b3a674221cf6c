//! Which NUMA nodes a mapping's pages come from.
//!
//! A policy is set on a mapping before its pages are touched. The kernel keeps that of a memfd with the file, for
//! whoever maps it; that of hugetlb memory with the mapping alone, which does no harm, since all its pages are made
//! through that one; and that of a guest_memfd with the file, or (Linux 6.18) with the mapping, where nothing ever
//! heeds it. So what came of a policy is looked up, not assumed.

use std::fs;
use std::io;

use abi::numa::NODES;
use abi::numa::Nodes;
use abi::numa::Policy;
use abi::regions::Store;

use crate::Mapping;
use crate::RegionError;
use crate::call_error;

/// `MPOL_PREFERRED_MANY`: newer than the bindings.
const MPOL_PREFERRED_MANY: libc::c_int = 5;

/// The kernel's NUMA nodes that have memory. A kernel that knows of no nodes has node 0.
pub fn host_nodes() -> Nodes {
    ["has_memory", "online"]
        .iter()
        .find_map(|file| fs::read_to_string(format!("/sys/devices/system/node/{file}")).ok()?.parse().ok())
        .or_else(|| Nodes::one(0))
        .unwrap_or_default()
}

/// Refuses nodes that this host does not have.
pub(crate) fn check_nodes(name: &str, policy: &Policy) -> Result<(), RegionError> {
    let have = host_nodes();
    let missing = policy.nodes().without(have);
    if missing.is_empty() {
        return Ok(());
    }
    let (missing, have) = (Box::new(missing), Box::new(have));
    Err(RegionError::Nodes { name: name.to_owned(), missing, have })
}

/// The kernel's number for a policy.
fn mode(policy: &Policy) -> libc::c_int {
    match policy {
        Policy::Default => libc::MPOL_DEFAULT,
        Policy::Bind(_) => libc::MPOL_BIND,
        Policy::Interleave(_) => libc::MPOL_INTERLEAVE,
        Policy::Preferred(nodes) if nodes.iter().count() == 1 => libc::MPOL_PREFERRED,
        Policy::Preferred(_) => MPOL_PREFERRED_MANY,
    }
}

fn policy_of(mode: libc::c_int, nodes: Nodes) -> Option<Policy> {
    match mode {
        libc::MPOL_DEFAULT => Some(Policy::Default),
        libc::MPOL_BIND => Some(Policy::Bind(nodes)),
        libc::MPOL_INTERLEAVE => Some(Policy::Interleave(nodes)),
        libc::MPOL_PREFERRED | MPOL_PREFERRED_MANY => Some(Policy::Preferred(nodes)),
        _ => None,
    }
}

impl Mapping {
    /// Sets the policy of the whole mapping, for pages that are made from now on.
    pub(crate) fn set_policy(&self, policy: &Policy) -> Result<(), RegionError> {
        let name = self.region().name();
        if *policy == Policy::Default {
            return Ok(());
        }
        check_nodes(name, policy)?;
        // Setting it again would change nothing, or, in another cpuset, what the others have.
        if self.heeded_policy()? == Some(*policy) {
            return Ok(());
        }
        let words = policy.nodes();
        let words = words.words();
        // The kernel takes one off.
        let bits = NODES + 1;
        // SAFETY: the kernel reads `NODES` bits of the words, which are as many, and changes how pages that are yet
        // to be made in this mapping, which is ours, are found.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.host_address(),
                self.len_bytes(),
                mode(policy),
                words.as_ptr(),
                bits,
                0,
            )
        };
        if result != 0 {
            return Err(call_error("set the NUMA policy of", name, io::Error::last_os_error()));
        }
        let found = self.heeded_policy()?;
        if found == Some(*policy) {
            return Ok(());
        }
        let (name, store) = (name.to_owned(), self.region().store());
        Err(RegionError::PolicyNotKept { name, store, policy: Box::new(*policy), found: found.map(Box::new) })
    }

    /// The policy that is heeded when a page is made.
    fn heeded_policy(&self) -> Result<Option<Policy>, RegionError> {
        match self.region().store() {
            // The file's alone, which another mapping shows.
            Store::GuestMemfd => policy_at(self.region().name(), self.second_look()?.0),
            Store::Memfd | Store::Hugetlb | Store::Path => self.policy(),
        }
    }

    /// The policy by which pages of this mapping are made; `None` if it is of a kind that Tideover never sets.
    ///
    /// # Errors
    /// [`RegionError::Call`] if the kernel does not say.
    pub fn policy(&self) -> Result<Option<Policy>, RegionError> {
        policy_at(self.region().name(), self.host_address())
    }
}

fn policy_at(name: &str, address: usize) -> Result<Option<Policy>, RegionError> {
    /// `MPOL_F_ADDR`: of the address, not of the thread.
    const OF_ADDRESS: libc::c_ulong = 1 << 1;
    let mut words = [0_u64; NODES / 64];
    let mut mode: libc::c_int = 0;
    // SAFETY: the kernel writes one int to `mode` and at most `NODES` bits to `words`, which has as many. The address
    // is looked up, not touched.
    let result = unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            &raw mut mode,
            words.as_mut_ptr(),
            NODES + 1,
            address,
            OF_ADDRESS,
        )
    };
    if result != 0 {
        return Err(call_error("read the NUMA policy of", name, io::Error::last_os_error()));
    }
    Ok(policy_of(mode, Nodes::from_words(words)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Region;

    fn on(text: &str) -> Nodes {
        text.parse().unwrap()
    }

    #[test]
    fn a_policy_is_set_before_pages_are_made_and_other_mappings_have_it() {
        let node = Nodes::one(host_nodes().iter().next().unwrap()).unwrap();
        for policy in [Policy::Bind(node), Policy::Interleave(node), Policy::Preferred(node)] {
            let mapping = Region::create("t", 4 << 20).unwrap().map_with(&policy, &mut |_, _| {}).unwrap();
            assert_eq!(mapping.policy().unwrap(), Some(policy));
            assert_eq!(mapping.region().allocated_bytes().unwrap(), Some(0));
            let fd = rustix::io::dup(mapping.region()).unwrap();
            let other = Region::accept("t", fd, 4 << 20).unwrap().map().unwrap();
            assert_eq!(other.policy().unwrap(), Some(policy));
            other.write(0, b"there").unwrap();
        }
        let plain = Region::create("t", 4096).unwrap().map().unwrap();
        assert_eq!(plain.policy().unwrap(), Some(Policy::Default));
    }

    #[test]
    fn nodes_that_the_host_does_not_have_are_named() {
        let beyond = host_nodes().iter().last().unwrap() + 1;
        let both = host_nodes().with(Nodes::one(beyond).unwrap());
        let missing = format!("node {beyond}, ");
        for policy in [Policy::Bind(both), Policy::Interleave(both), Policy::Preferred(on("1023"))] {
            let refused = Region::create("t", 4096).unwrap().map_with(&policy, &mut |_, _| {}).unwrap_err();
            let text = refused.to_string();
            let named = if policy == Policy::Preferred(on("1023")) { "node 1023, " } else { &missing };
            assert!(text.contains(named), "{text}");
        }
    }

    #[test]
    fn a_policy_is_the_kernels_by_number() {
        let one = on("0");
        let many = on("0-1");
        for policy in [
            Policy::Default,
            Policy::Bind(many),
            Policy::Interleave(many),
            Policy::Preferred(one),
            Policy::Preferred(many),
        ] {
            assert_eq!(policy_of(mode(&policy), policy.nodes()), Some(policy));
        }
        assert_eq!(mode(&Policy::Preferred(many)), 5);
        assert_eq!(policy_of(libc::MPOL_LOCAL, Nodes::NONE), None);
    }
}
