/** A message for the person at the page, one or two plain sentences: what is wrong, and what to do. */
export class UserError extends Error {}
