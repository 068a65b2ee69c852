// Log lines as JSON, with the fields that the services of all languages have.

export const SERVICE = "service-name";

export function info(message, fields = {}) {
  log("info", message, fields);
}

export function error(message, fields = {}) {
  log("error", message, fields);
}

function log(level, message, fields) {
  console.log(JSON.stringify({ time: new Date().toISOString(), level, service: SERVICE, message, ...fields }));
}
