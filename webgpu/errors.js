/** An error that the user can put right. Its message says in one or two plain sentences what is wrong and what to do. */
export class UserError extends Error {}
