//! Requests that come again, because the worker that had them died before it answered.
//!
//! What such a request asked for may have been done, so doing it again would fail: then it is answered as it would have been the first
//! time. containerd knows nothing of all that, and never repeats a request itself.

use std::collections::HashMap;

use async_trait::async_trait;
use kuasar_sandboxers::{Error, Result};
use ttrpc::{
    r#async::{MethodHandler, Service, TtrpcContext},
    proto::{Request, Response},
};

use super::journal::DEATHS;
use crate::status::IntoStatus;

/// Methods that may be under way for ever and do nothing meanwhile: many a worker may die before they end, and never because of them.
const HARMLESS: [&str; 1] = ["Wait"];

/// Whether a worker has died while the request was unanswered.
pub(super) fn is_repeated(context: &TtrpcContext) -> bool {
    context.mh.flags & DEATHS != 0
}

/// The result of a repeated request: where it failed, what `earlier` finds out of the first time, if that succeeded.
pub(super) async fn or_earlier<T>(
    result: Result<T>,
    context: &TtrpcContext,
    earlier: impl AsyncFnOnce(&Error) -> Option<T>,
) -> Result<T> {
    match result {
        Err(error) if is_repeated(context) => earlier(&error).await.ok_or(error),
        result => result,
    }
}

/// The services, where a request is answered with an error that has been unanswered at three deaths: it may be what they died of.
pub(super) fn guarded(services: HashMap<String, Service>) -> impl Iterator<Item = (String, Service)> {
    services.into_iter().map(|(name, mut service)| {
        let methods = std::mem::take(&mut service.methods).into_iter();
        service.methods = methods.map(|(method, handler)| (method.clone(), guard(method, handler))).collect();
        (name, service)
    })
}

type Handler = Box<dyn MethodHandler + Send + Sync>;

fn guard(method: String, handler: Handler) -> Handler {
    if HARMLESS.contains(&method.as_str()) { handler } else { Box::new(Guard { method, handler }) }
}

struct Guard {
    method: String,
    handler: Handler,
}

#[async_trait]
impl MethodHandler for Guard {
    async fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        if context.mh.flags & DEATHS == DEATHS {
            let why = "kuasard has died three times with this request unanswered, so it is not tried again; see its log";
            return Err(Error::failed(format!("answer {}", self.method))(why)).ttrpc();
        }
        self.handler.handler(context, request).await
    }
}
