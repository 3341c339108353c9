//! Traffic control: everything that comes in on one interface goes out on another.
//!
//! A `u32` filter without keys matches every frame, as `matchall` would, which fewer kernels have. Frames are taken before the
//! namespace's own IP stack sees them.

use std::io;

use kuasar_sandboxers::netlink::{Netlink, errno};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType,
    TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcHeader, TcMessage, TcMirror, TcMirrorActionType, TcOption,
    TcU32Selector, TcU32SelectorFlags,
};

use super::rtm;

/// Tells our filter from others on the same interface; of the lesser ones, so that what the CNI plugin has put there comes first.
const PRIORITY: u32 = 0x4b55;

/// `ETH_P_ALL`, in network byte order as a filter has it.
const EVERY_PROTOCOL: u16 = 0x0003u16.to_be();

/// More filters than anybody has on an interface.
const FILTERS_MAX: usize = 4096;

fn on(interface: u32, parent: TcHandle) -> io::Result<TcMessage> {
    let mut message = TcMessage::with_index(i32::try_from(interface).map_err(io::Error::other)?);
    message.header.parent = parent;
    Ok(message)
}

fn qdisc(interface: u32) -> io::Result<TcMessage> {
    let mut message = on(interface, TcHandle::CLSACT)?;
    message.header.handle = TcHandle { major: 0xffff, minor: 0 };
    message.attributes.push(TcAttribute::Kind("clsact".into()));
    Ok(message)
}

fn ingress() -> TcHandle {
    TcHandle { major: 0xffff, minor: TcHandle::MIN_INGRESS }
}

fn egress() -> TcHandle {
    TcHandle { major: 0xffff, minor: TcHandle::MIN_EGRESS }
}

fn mark(header: &mut TcHeader) {
    header.info = PRIORITY << 16 | u32::from(EVERY_PROTOCOL);
}

/// Redirects what comes in on `from` so that it goes out on `to`.
pub(super) fn redirect(netlink: &mut Netlink, from: u32, to: u32) -> io::Result<()> {
    match netlink.request(rtm::NEW_QDISC, NLM_F_CREATE | NLM_F_EXCL, &qdisc(from)?) {
        // It has one, of this or the older kind (`ingress`); both take the filter.
        Err(error) if errno(&error) == Some(libc::EEXIST) => {}
        done => done?,
    }
    let mut mirror = TcMirror::default();
    mirror.generic = TcActionGeneric::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    let mut everything = TcU32Selector::default();
    everything.flags = TcU32SelectorFlags::Terminal;
    let mut filter = on(from, ingress())?;
    mark(&mut filter.header);
    filter.attributes = vec![
        TcAttribute::Kind(TcFilterU32::KIND.into()),
        TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Selector(everything)),
            TcOption::U32(TcFilterU32Option::Action(vec![action])),
        ]),
    ];
    netlink.request(rtm::NEW_FILTER, NLM_F_CREATE | NLM_F_EXCL, &filter)
}

/// Takes [`redirect`] back, if it was done; the qdisc too unless others use it.
pub(super) fn restore(netlink: &mut Netlink, interface: u32) -> io::Result<()> {
    let mut filter = on(interface, ingress())?;
    mark(&mut filter.header);
    match netlink.request(rtm::DEL_FILTER, 0, &filter) {
        // No such filter; no such qdisc; no such interface.
        Err(error) if matches!(errno(&error), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) => return Ok(()),
        done => done?,
    }
    for direction in [ingress(), egress()] {
        let filters: Vec<TcMessage> =
            netlink.list(rtm::GET_FILTER, rtm::NEW_FILTER, &on(interface, direction)?, FILTERS_MAX)?;
        if !filters.is_empty() {
            return Ok(());
        }
    }
    match netlink.request(rtm::DEL_QDISC, 0, &qdisc(interface)?) {
        // One of the older kind, which is not ours.
        Err(error) if matches!(errno(&error), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) => Ok(()),
        done => done,
    }
}
